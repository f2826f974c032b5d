"""slurm/container.def by the rules of Apptainer's parser; no image is built."""

import configparser
import re
from pathlib import Path

TOP = Path(__file__).parents[1]
SECTIONS = {"files", "labels", "environment", "post", "runscript", "test", "help"}


def parts() -> dict[str, list[str]]:
    """Lines by section; the header under ""."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in (TOP / "slurm/container.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].strip().lower()
            assert name not in found, name
            found[name] = []
        elif line.strip() and not line.strip().startswith("#"):
            found[name].append(line.strip())
    return found


def test_the_header_and_the_sections_are_apptainers() -> None:
    found = parts()
    assert [line.split(":")[0] for line in found.pop("")] == ["Bootstrap", "From"]
    assert set(found) <= SECTIONS


def test_each_line_of_files_is_a_source_and_a_destination_and_all_that_the_package_needs_is_there() -> None:
    """Apptainer takes the second word of a line as the destination, and ignores all others."""
    copied = {}
    for line in parts()["files"]:
        source, destination = line.split()
        assert (TOP / source).exists(), source
        copied[destination] = source
    assert copied["/opt/fedmpi/src"] == "src" and copied["/opt/fedmpi/pyproject.toml"] == "pyproject.toml"
    setup = configparser.ConfigParser()
    setup.read(TOP / "setup.cfg")
    named = re.findall(r"file: *(\S+)", (TOP / "setup.cfg").read_text())
    assert {"setup.cfg", *named, *setup["metadata"].get("license_files", "").split()} <= {*copied.values()}
    for word in re.findall(r"/opt/fedmpi/[\w./-]+", "\n".join(line for lines in parts().values() for line in lines)):
        assert any(word.startswith(destination) for destination in copied), word
