"""Reports for tests: run directories made from records, and a reader of the page's HTML."""

import json
import re
import socket
from html.parser import HTMLParser

from fedmpi.components import build, to_dict
from fedmpi.config import Config
from fedmpi.directory import write_config
from fedmpi.records.metrics import line_of
from fedmpi.report import write

HEADS = ("h2", "h3", "h4", "h5", "summary", "caption")
VOID = ("meta", "br", "input", "hr", "img", "link")
SHORT = ("rect", "circle", "path", "polyline")  # of SVG, closed by themselves
ABOUT = {
    "versions": {"fedmpi": "0", "python": "3"},
    "unshared": "",
    "metric": "accuracy",
    "maximize": True,
    "params": 10,
    "plan": "replicated",
    "ranks": 2,
    "model": {},
    "code": {},
}


def record(number, silos, **more):
    """A record of a round in which all silos took part."""
    rows = {
        silo: {
            "rank": i % 2,
            "num_train": 10 + i,
            "train_loss": 1.0 / number,
            "num_samples": 10,
            "num_test": 5 + i,
            "loss": 1.5 / number + 0.01 * i,
            "accuracy": (number + 0.1 * i) / (number + 5),
        }
        for i, silo in enumerate(silos)
    }
    worst = min(rows, key=lambda silo: rows[silo]["accuracy"])
    phases = {"agree": 0.0 if number == 1 else 0.125, "train": 0.5, "wait": 0.25, "round": 0.875}
    return {
        "schema": 1,
        "round": number,
        "cohort": list(silos),
        "rejected": [],
        "train_loss": 1.0 / number,
        "loss": 1.5 / number,
        "accuracy": number / (number + 4),
        "worst": {"silo": worst, "accuracy": rows[worst]["accuracy"]},
        "seconds": phases,
        "bytes_up": 1000 + number,
        "bytes_down": 2000,
        "bytes_control": 300,
        "peak_rss_bytes": [10**8, 2 * 10**8],
        "silos": rows,
    } | more


def directory(root, records, about=(), done=True, **config):
    """A run directory that holds these records and nothing else; `done`: as of a run that has come to its end."""
    root.mkdir(parents=True, exist_ok=True)
    values = to_dict(build(Config, {"rounds": max(1, len(records)), "out": str(root), **config}))
    write_config(root, values, {**ABOUT, **dict(about)})
    (root / "metrics.jsonl").write_bytes(b"".join(line_of(one) for one in records))
    ranks = [
        {"rank": rank, "host": socket.gethostname(), "device": "cpu", "threads": 1, "silos": []} for rank in range(2)
    ]
    (root / "ranks.json").write_text(json.dumps(ranks))
    (root / ".lock").touch()
    if done:
        (root / "model.safetensors").touch()
    return root


class Page(HTMLParser):
    """What a test wants to know of a page.

    ids, links, resources   of elements; resources: addresses that a browser would load
    tables                  {title of figure or caption or summary: [rows of (text, data-value)]}
    charts                  the charts' data, by id; titles: their ids by heading
    levels, radios          of headings; names of radio buttons, and whether they are checked
    text                    all text outside of scripts and styles
    """

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.html, self.ids, self.links, self.resources, self.open, self.unlabelled = html, [], [], [], [], []
        self.tables, self.titles, self.texts, self.faults, self.scripts = {}, {}, [], [], []
        self.levels, self.radios = [], []
        self.heading, self.cell, self.row, self.rows, self.chart = "", None, None, None, None
        self.feed(html)
        self.close()
        self.faults += [f"{tag} is not closed" for tag in self.open]
        self.charts = json.loads(re.search(r'id="charts">(.*?)</script>', html, re.DOTALL)[1])

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [at["id"]] if "id" in at else []
        if tag in ("h1", *HEADS[:4]):
            self.levels.append(int(tag[1]))
        if at.get("type") == "radio":
            self.radios.append((at["name"], "checked" in at))
        if tag == "a":
            self.links.append(at["href"])
        self.resources += [at[name] for name in ("src", "srcset", "data", "action", "poster") if name in at]
        self.resources += [at["href"]] if tag in ("link", "base", "image", "use") else []
        if tag == "script":
            self.scripts.append("")
        if at.get("role") == "img" and not at.get("aria-label"):
            self.unlabelled.append(at)
        if tag in HEADS:
            self.heading = ""
        if "data-chart" in at:
            self.titles.setdefault(self.heading, at["data-chart"])  # in the order of the page
        if tag == "table":
            self.rows = self.tables[f"{self.heading}#{len(self.tables)}"] = []
        if tag == "tr":
            self.row = []
            self.rows.append(self.row)
        if tag in ("td", "th"):
            self.cell = ["", float(at["data-value"]) if "data-value" in at else None]
            self.row.append(self.cell)

    def handle_startendtag(self, tag, attrs):
        if tag not in SHORT:
            self.faults.append(f"{tag} closes itself")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"{tag} at {self.getpos()} closes another")
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            if self.open[-1] == "script":
                self.scripts[-1] += data
            return
        self.texts.append(data)
        if self.cell is not None:
            self.cell[0] += data
        if self.open and self.open[-1] in HEADS:
            self.heading += data

    def under(self, heading):
        """The id of the chart under a heading."""
        return self.charts[self.titles[heading]]

    def table(self, *heads):
        """Rows of the first table whose head begins so: {first cell: {head: value or text}}."""
        for rows in self.tables.values():
            names = [text for text, _ in rows[0]]
            if names[: len(heads)] == list(heads):
                return {
                    row[0][0]: {
                        name: text if value is None else value for name, (text, value) in zip(names, row, strict=True)
                    }
                    for row in rows[1:]
                }
        raise AssertionError(f"no table with {heads}")


def page(*roots, out=None, title=""):
    """The page about run directories."""
    path = write(list(roots), out, title)
    return Page(path.read_text())


def sound(found):
    """Asserts what holds for every page."""
    assert found.faults == [] and found.unlabelled == []
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.links} <= set(found.ids) and all(link[0] == "#" for link in found.links)
    assert found.levels[0] == 1 and found.levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(found.levels, found.levels[1:], strict=False))
    chosen = [name for name, checked in found.radios if checked]
    assert sorted(chosen) == sorted({name for name, _ in found.radios})  # one of each group
    assert len(found.charts) == found.html.count(" data-chart=")
    for chart in found.charts.values():
        assert chart["traces"] and all(trace.get("name") is not None for trace in chart["traces"])
        layout = chart["layout"]
        titles = [layout.get(axis, {}).get("title") for axis in ("xaxis", "yaxis")]
        assert any(titles) or chart["axes"], "no axis says what it shows"
        for trace in chart["traces"]:
            for x in trace.get("over", {"": trace.get("x", [])}).values():
                assert len(x) == len(trace["y"])
    assert not re.search(r"\b(nan|inf|None|NaN|Infinity)\b", found.text)
