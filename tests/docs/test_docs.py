"""README and docs/: blocks run, links work, pages are short, the site builds. test_reference.py: the reference."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.mpi import absent
from support.programs import page as page_program

TOP = Path(__file__).parents[2]
PROGRAM = TOP / "tests/support/programs/page.py"
TOP_PAGES = [TOP / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [page for page in TOP_PAGES if page.exists()] + sorted((TOP / "docs").rglob("*.md"))
MOST_LINES = 300

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(TOP).as_posix())


def to_run(page):
    return [b for b in page_program.blocks(page) if b.language in page_program.RUN and b.reason is None]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if to_run(p)], ids=lambda page: page.relative_to(TOP).as_posix())
@pytest.mark.mpi
def test_the_blocks_of_a_page_run(page):
    launches = any("mpirun" in block.text or "mpiexec" in block.text for block in to_run(page))
    if launches and not (shutil.which("mpirun") or (Path(sys.executable).parent / "mpirun").exists()):
        absent("mpi", "the page starts ranks, and there is no mpirun")
    env = {**os.environ, "PYTHONPATH": f"{TOP / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, PROGRAM, page], capture_output=True, text=True, timeout=240, env=env, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert len(re.findall(r"^/.*:\d+: \w+, ", done.stdout, re.MULTILINE)) == len(to_run(page))


@each_page
def test_every_block_names_its_language_and_every_skip_its_reason(page):
    known = (*page_program.RUN, *page_program.SHOWN)
    for block in page_program.blocks(page):
        assert block.language in known, f"{page}:{block.line}: the language is '{block.language}', of {known}"
        assert block.reason is None or len(block.reason.split()) >= 3, f"{page}:{block.line}: give a reason"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("```bash\nfalse\ntrue\n```\n", "exit code 1"),
        ("```python\nassert 1 == 2\n```\n", "AssertionError"),
        ("```yaml\nlocal: {name: sgd, lr: 0.1, epochs: 1, rte: 1}\n```\n", "rte"),
    ],
)
def test_a_block_that_fails_fails_the_page(tmp_path, text, why):
    page = tmp_path / "page.md"
    page.write_text(f"<!-- not run: an example of it -->\n```bash\nfalse\n```\n\n{text}")
    done = subprocess.run([sys.executable, PROGRAM, page], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and why in done.stderr and f"{page}:6:" in done.stderr


@each_page
def test_a_page_is_short(page):
    assert len(page.read_text().splitlines()) < MOST_LINES


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page):
    """Link targets in a page: its headings as code hosts and mkdocs write them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heads = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page}: {link}: no such heading"


def test_the_spelling_is_right():
    if importlib.util.find_spec("codespell_lib") is None:
        absent("docs", "codespell is not installed (pip install fedmpi[docs])")
    folders = ("src", "docs", "jobs", "tests", "configs", "slurm", "examples", *(page.name for page in TOP_PAGES))
    there = [folder for folder in folders if (TOP / folder).exists()]
    command = [sys.executable, "-m", "codespell_lib", "--config", "setup.cfg", *there]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not (TOP / "mkdocs.yml").exists(), reason="there is no mkdocs.yml")
def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("material") is None:
        absent("docs", "mkdocs-material is not installed (pip install fedmpi[docs])")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(TOP / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site/index.html").exists()


# What replaces a value in a message.
VALUES = (
    r"'[^']*'|\b\d+\b|\[\d+\]"
    r"|\b(?:\w+_LOCALID|median|pooled|ranks?|n[12]|nan|x_train)\b|\S+\.(?:gz|pt|jsonl)\b|[;,] "
)


def test_messages_in_troubleshooting_are_messages_of_the_code():
    """Each heading's message, cut at its values, is in the source (or comes from the launcher)."""
    source = " ".join(
        re.sub(r'"\s*f?"', "", re.sub(r"\s+", " ", path.read_text())) for path in (TOP / "src").rglob("*.py")
    )
    for line in (TOP / "docs/troubleshooting.md").read_text().splitlines():
        if line.startswith("### ") and "(Open MPI)" not in line:
            for message in re.findall(r"`([^`]*)`", line):
                parts = re.split(VALUES, message)
                parts = [part.strip(" ;,.:?()") for part in parts if len(part.strip(" ;,.:?()")) > 8]
                assert parts or len(message) < 40, message
                for part in parts:
                    assert part in source, f"{message}: '{part}' is in no source"


@each_page
def test_files_of_the_repository_that_a_page_names_exist(page):
    text = page.read_text()
    for path in re.findall(r"(?<![\w./-])((?:tests|jobs|configs|examples|slurm)/[\w./-]*\w/?)", text):
        assert (TOP / path).exists(), f"{page}: {path}"
