"""What a configuration reveals of a silo, and to whom: the table of `fedmpi plan --privacy` (docs/privacy.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedmpi.config import Config
from fedmpi.data.files import Files
from fedmpi.exchange.plans import PLANS
from fedmpi.secure.session import left_alone

READERS = ("server", "other silos", "network", "run directory")
NO, YES, CLEAR = "no", "yes", "yes, not encrypted"


class Row(NamedTuple):
    """Who sees something of one silo. Server: rank 0, which may host silos as well. Other silos: the other ranks.
    Network: whoever reads the traffic between hosts. Run directory: whoever can read all of its files."""

    what: str
    server: str
    silos: str
    network: str
    files: str


def reveals(
    config: Config, ids: Sequence[str], hosted: Sequence[int], plan: str, central: bool, keeps: bool
) -> list[Row]:
    """The rows for a federation: `hosted` silos on each rank, `plan` of the exchange; `central`: one data set that
    every rank reads; `keeps`: whether silos keep vectors from round to round."""
    alone = sum(num > 0 for num in hosted) < 2
    reads = "all ranks read all of it" if central else NO
    rows = [Row("samples, targets, outputs", reads, reads, NO, NO)]
    rows += [_update(config, ids, hosted, plan), _figures(config)]
    usable = ", and who was usable" if config.disclosed != "pooled" or config.secure is not None else ""
    rows.append(Row("who takes part in a round", f"yes{usable}", f"yes{usable}", CLEAR, YES))
    if isinstance(config.data, Files) and config.data.statistics == "pooled":
        rows.append(_statistics(config.data))
    rows.append(Row("ids, sample counts, hosts", YES, YES, CLEAR, YES))
    summed = "yes, as a checkpoint" if config.disclosed == "silo" else "the silo's checkpoint"
    told = (NO, NO, NO) if config.hides_checksums else (YES, YES, CLEAR)
    rows.append(Row("a checksum of the data", *told, summed))
    rows.append(Row("seconds of its rank's phases", YES, YES, CLEAR, YES if config.records.trace else "sums"))
    rows.append(Row("error messages of its rank", YES, YES, CLEAR, "no, but kept output"))
    rows.append(Row("the model, in which updates are", YES, YES, CLEAR, YES))
    if keeps:
        copies = "copies, under ulfm" if config.adopts else NO
        rows.append(Row("vectors that a silo keeps", copies, copies, copies, "the silo's checkpoint"))
    if config.transport.apart:
        return [row._replace(network=_in_files(row.network)) for row in rows]
    return [row._replace(network="nothing is sent") for row in rows] if alone else rows


def _in_files(network: str) -> str:
    """What who reads the shared folder sees, from what who reads the network would see."""
    if network == NO:
        return NO
    return "files of the shared folder" if network == CLEAR else f"{network}, in the shared folder"


def _update(config: Config, ids: Sequence[str], hosted: Sequence[int], plan: str) -> Row:
    files = "the silo's checkpoint" if config.exchange.goes_on or config.exchange.lossy else "only the model"
    fewest = 0 if config.secure is None else config.secure.fewest(config, ids)
    if config.transport.apart and config.secure is not None:
        return Row("a silo's update", f"a sum of {fewest} or more", "in the model only", "masked words", "sums")
    if config.transport.apart:
        return Row("a silo's update", YES, "who reads the shared folder", CLEAR, "only the model")
    if config.secure is not None:
        return Row("a silo's update", f"a sum of {fewest} or more", "the same, with their own", "masked words", files)
    if config.exchange.scope == "silo" or config.engine.arrivals:
        others = NO if config.engine.arrivals else "pieces of it"
        return Row("a silo's update", YES if config.engine.arrivals else "pieces of it", others, CLEAR, files)
    lone = min((num for num in hosted if num), default=1) == 1
    sent = "it" if lone else "sums over a rank's silos"
    server, silos = (text.format(sent) for text in PLANS.find(plan).sees)
    return Row("a silo's update", server, silos, f"{sent}, not encrypted", files)


def _statistics(data: Files) -> Row:
    if data.scale == "minmax":
        return Row("sums and ends of its columns, once", "of a rank's silos", "the same", CLEAR, "pooled")
    return Row("sums of its columns, once", "sums", "sums", "sums of a rank's silos", "pooled")


def _figures(config: Config) -> Row:
    what = "losses, norms, metrics, samples used"
    if config.privacy is not None and config.privacy.of_records:  # training losses and samples used carry no noise
        what = "norms of noised updates, metrics on test data"
    elif config.privacy is not None and config.secure is not None:
        what = "metrics on test data"
    if config.secure is not None:
        return Row(what, "sums", "sums", "masked", "sums")
    if config.disclosed == "silo":
        return Row(what, YES, YES, CLEAR, YES)
    return Row(what, "sums", "sums", "sums of a rank's silos", "sums")


def trust(config: Config, ids: Sequence[str], hosted: Sequence[int]) -> list[str]:
    """Sentences below the table: who is trusted with what. `hosted` silos on each rank."""
    if config.secure is None:
        told = [
            "Every rank, and the network between hosts, is trusted with what it sees. secure: secagg sums under masks."
        ]
    else:
        told = [
            f"All {'jobs' if config.transport.apart else 'ranks'} are trusted to run this program unchanged; keys are "
            "exchanged without signatures.",
            "Whoever controls several silos can subtract them from a sum: what is left is the sum of the others.",
        ]
        if why := left_alone(hosted, config.secure.fewest(config, ids)):
            told.append(f"Warning: {why}.")
        if config.select.least(ids, config.rounds) < len(ids):
            told.append(
                "Cohorts change: once updates hardly change from round to round, sums of different cohorts together "
                "say nearly what sums that differ by one silo say; select: all keeps one cohort."
            )
    if config.privacy is not None:
        return [*told, config.privacy.sentence(config)]
    return [*told, "Nothing here is differential privacy: sums and models may still say something about a silo."]
