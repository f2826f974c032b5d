"""A hook of mkdocs: what a page's Markdown needs to become a page of the site.

Formulas, which pymdownx.arithmatex marks, become MathML: browsers show them without any script or network. Links to
files outside docs/, which a code host follows, become the files' names. A bar that a table's code escapes is a bar.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:configs|src|examples|jobs|slurm|tests)/[^)#\s]*|[A-Z]+(?:\.\w+)?)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page's text; where it links to a file outside docs/, the name of the file."""
    return OUTSIDE.sub(lambda match: match[1] if match[1].startswith("`") else f"`{match[2]}`", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with MathML in place of formulas."""
    return CELL.sub(lambda match: match[0].replace(r"\|", "|"), FORMULA.sub(_mathml, content))


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    return f'<{match[1]} class="formula">{convert(html.unescape(match[3]).strip(), display=display)}</{match[1]}>'
