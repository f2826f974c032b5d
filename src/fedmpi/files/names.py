"""What the files of the transport are called. A name says who wrote it, so it has one writer and one content.

    run                 which run the folder belongs to
    epochs/E            claim of the server's epoch E
    epochs/commit.E.V.part-T    commit V of epoch E before it is linked; so, too, its calls and beats
    line/V              commit of version V
    notes/KIND.N.E      a file of the server's epoch E, such as the parameters of a version
    silos/ID.I          claim of incarnation I of a silo
    updates/ID.N.I      update number N of a silo
    scores/ID.N.I       what a silo tells besides updates
    states/ID.N.I       the silo's own state after its training number N
    kept/ID.N.I         a committed update, if updates are kept
    beats/ID.I, @.E     heart beats of a silo, of the server

With secure sums (sums.py), where S is the serial number of a sum:

    secure/WHAT.S       a decision of the server, made by the first link
    epochs/WHAT.E.S.part-T      a decision of epoch E before it is linked
    shares/ID.S.I       shares of a silo's secrets, sealed for each member
    masked/ID.S.I       a silo's vector and figures under masks
    answers/ID.S.I      what a silo tells of others' secrets, sealed for the server

NAME.part-T is a temporary file; T is random. Numbers have eight digits.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from fedmpi.errors import ConfigError

RUN = "run"
EPOCHS, LINE, NOTES, SILOS, BEATS, KEPT = "epochs", "line", "notes", "silos", "beats", "kept"
UPDATE, SCORE, STATE = "update", "score", "state"  # kinds of a silo's files
OF_SILOS = {UPDATE: "updates", SCORE: "scores", STATE: "states"}  # their folders
FOLDERS = (EPOCHS, LINE, NOTES, SILOS, BEATS, KEPT, *OF_SILOS.values())
COMMIT, CALL, BEAT = "commit", "call", "beat"  # what a server says: written beside the claims of epochs
SECURE = "secure"  # the folder of decisions about sums, and these:
MEMBERS, ROSTER, SURVIVORS, CLOSED = "members", "roster", "survivors", "closed"
SHARE, MASKED, ANSWER = "share", "masked", "answer"  # kinds of a silo's letters
LETTERS = {SHARE: "shares", MASKED: "masked", ANSWER: "answers"}  # their folders
FOLDER_OF = OF_SILOS | LETTERS
SUM_FOLDERS = (SECURE, *LETTERS.values())
SERVER = "@"  # the server's name among those who beat; no silo's name contains it
PART = ".part-"
LONGEST = 120  # characters of a silo's name in file names

_NUMBERED = re.compile(r"(?:(?P<who>[^./]+)\.)?(?P<numbers>\d{8}(?:\.\d{8})?)")


def quoted(silo: str) -> str:
    """A silo's id as part of a file name. Raises ConfigError if it is too long.

    >>> quoted("clinic-1"), quoted("St. Mary/3"), unquoted(quoted("St. Mary/3"))
    ('clinic-1', 'St%2E%20Mary%2F3', 'St. Mary/3')
    """
    name = quote(silo, safe="").replace(".", "%2E").replace("~", "%7E")
    if not 0 < len(name) <= LONGEST:
        raise ConfigError(f"silo id '{silo}' is empty or too long for file names ({len(name)} of {LONGEST} characters)")
    return name


def unquoted(name: str) -> str:
    """The id that `quoted` has made this name from."""
    return unquote(name)


def numbered(*numbers: int) -> str:
    """Numbers as in file names.

    >>> numbered(7, 2)
    '00000007.00000002'
    """
    return ".".join(f"{number:08d}" for number in numbers)


def parsed(name: str) -> tuple[str, tuple[int, ...]] | None:
    """Who and which numbers a file name states; None for temporary and foreign names.

    >>> parsed("clinic-1.00000007.00000002"), parsed("00000003"), parsed("00000003.part-ab")
    (('clinic-1', (7, 2)), ('', (3,)), None)
    """
    match = _NUMBERED.fullmatch(name)
    if not match:
        return None
    who = match["who"] or ""
    return SERVER if who == SERVER else unquote(who), tuple(int(number) for number in match["numbers"].split("."))


def path(folder: str, who: str, *numbers: int) -> str:
    """The path of a numbered file below the root; `who` is a silo's id, SERVER, or empty."""
    front = who if who in ("", SERVER) else quoted(who)
    return f"{folder}/{front}{'.' if front else ''}{numbered(*numbers)}"
