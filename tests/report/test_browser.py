"""The report in a real browser: charts are drawn from the page's numbers, in any theme and width, without a network."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from support.mpi import absent
from support.pages import directory, record

from fedmpi.report import write

SILOS = ["<script>alert(1)</script>", "b & c", "amsterdam", "mammography-W-MWWM"]
NAMES = ("chromium", "chromium-browser", "google-chrome")

# Run in the page once all is drawn; what it finds becomes the page's last element.
PROBE = """
const wait = () => {
  if (document.documentElement.dataset.drawn !== "yes") { setTimeout(wait, 20); return; }
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const found = {faults: window.faults, drawn: {}, width: document.documentElement.scrollWidth, inner: innerWidth};
  for (const box of document.querySelectorAll(".chart")) {
    const {legend, ...layout} = box.layout;  // the library's check fails on any order of a legend
    found.drawn[box.dataset.chart] = {
      y: box.data.map((t) => t.y), x: box.data.map((t) => t.x), names: box.data.map((t) => t.name),
      texts: [...box.querySelectorAll("text")].map((t) => t.textContent),
      invalid: (Plotly.validate(box.data, layout) || []).filter((f) => f.code !== "unused").map((f) => f.msg),
      ink: box._fullLayout.font.color, height: box.clientHeight,
      scrolls: [...box.querySelectorAll(".scrollbar")].filter((bar) => Number(bar.getAttribute("height")) > 0).length,
      fills: [...box.querySelectorAll(".point path")].filter((p) => !p.style.fill || p.style.fill === "none").length,
    };
  }
  const texts = [...document.querySelectorAll(".scroll > svg text")];
  found.cut = texts.filter((t) => t.getBBox().x < 0).map((t) => t.textContent);
  found.times = [...document.querySelectorAll(".stack td")].map((td) => getComputedStyle(td).display);
  document.querySelector('input[value="seconds"]').click();
  const told = () => {
    const box = document.querySelector(".chart");
    found.seconds = box.data.map((t) => t.x);
    const out = document.createElement("pre");
    out.id = "found";
    out.textContent = JSON.stringify(found);
    document.body.append(out);
  };
  setTimeout(told, 500);
};
wait();
"""


# Chromium has no window narrower than 500 pixels, so a phone is a frame in one.
PHONE = """<!doctype html><body><iframe src="probed.html" style="width:390px;height:900px"></iframe><script>
const wait = () => {
  const found = document.querySelector("iframe").contentDocument.getElementById("found");
  if (found) document.body.append(document.importNode(found, true)); else setTimeout(wait, 50);
};
wait();
</script>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Opens a page in headless Chromium and returns what the probe finds."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        absent("chromium", "there is no chromium")
    profile = tmp_path_factory.mktemp("profile")

    def look(path, *options, phone=False):
        # The policy allows the page's own scripts only, so the probe goes into a copy with its own policy.
        text = path.read_text()
        policy = re.search(r"<meta http-equiv=[^>]*>", text)[0]
        hook = "<script>window.faults = []; addEventListener('error', (e) => faults.push(e.message));</script>"
        probed = text.replace(policy, hook).replace("</body>", f"<script>{PROBE}</script></body>")
        copy = path.with_name("probed.html")
        copy.write_text(probed)
        if phone:
            copy = path.with_name("phone.html")
            copy.write_text(PHONE)
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=10000",
            "--dump-dom",
            "--allow-file-access-from-files",
        ]
        done = subprocess.run(
            [program, *flags, f"--user-data-dir={profile}", *options, copy.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))

    return look


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    records = [record(number, SILOS) for number in range(1, 6)]
    records[2]["accuracy"] = None
    records[3] |= {"late": {"amsterdam": "partial"}, "deadline_s": 1.0}
    root = directory(tmp_path_factory.mktemp("run") / "run", records)
    (root / "events.jsonl").write_text('{"event": "stopped", "round": 2}\n')
    phases = [("train", 0.5), ("wait", 0.25)]
    events = [
        {"name": name, "ph": "X", "pid": rank, "tid": 0, "ts": n * 1e6, "dur": s * 1e6, "args": {"round": n}}
        for n in range(1, 6)
        for rank in (0, 1)
        for name, s in phases
    ]
    (root / "trace.json").write_text("[\n" + ",\n".join(map(json.dumps, events)) + "\n]\n")
    return write([root])


@pytest.mark.slow
def test_charts_are_drawn_from_the_numbers_of_the_page(browser, path):
    found = browser(path, "--window-size=1280,2000")
    given = json.loads(re.search(r'id="charts">(.*?)</script>', path.read_text(), re.DOTALL)[1])
    assert found["faults"] == [] and set(found["drawn"]) == set(given) and len(given) >= 6
    for name, drawn in found["drawn"].items():
        assert drawn["invalid"] == [] and drawn["fills"] == 0
        assert drawn["y"] == [trace["y"] for trace in given[name]["traces"]]
    first = found["drawn"]["chart-1"]
    assert first["y"][first["names"].index("all silos")] == [1 / 5, 2 / 6, None, 4 / 8, 5 / 9]
    assert {"all silos", "worst silo"} <= set(first["texts"])  # names at the ends of lines
    assert found["seconds"][first["names"].index("all silos")] == pytest.approx([0.875 * n for n in range(1, 6)])
    texts = [text for drawn in found["drawn"].values() for text in drawn["texts"]]
    assert any(text.startswith("<script>alert(1)") for text in texts) and "b & c" in texts
    assert found["width"] <= found["inner"] == 1280


@pytest.mark.slow
def test_a_phone_in_the_dark_gets_its_own_colours_and_no_page_that_scrolls_sideways(browser, path):
    found = browser(path, "--window-size=600,1000", "--blink-settings=preferredColorScheme=0", phone=True)
    assert found["faults"] == [] and found["width"] <= found["inner"] == 390
    assert found["cut"] == [] and sum(drawn["scrolls"] for drawn in found["drawn"].values()) == 0
    assert set(found["times"]) == {"block"}
    inks = {drawn["ink"] for drawn in found["drawn"].values()}
    assert inks == {"#e5eaee"} and all(drawn["invalid"] == [] for drawn in found["drawn"].values())
