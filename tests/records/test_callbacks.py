"""Callbacks: users' functions, called with every record."""

import json
import re

import pytest
from support.runs import config, figures, put_back, run
from support.silojobs import apart, trained_apart

import fedmpi
from fedmpi import results
from fedmpi.comm import SoloComm
from fedmpi.components import build, to_dict
from fedmpi.config import Config, load
from fedmpi.errors import ConfigError
from fedmpi.records import Callback, read_metrics
from fedmpi.trust import confined

__all__ = ["put_back"]

OWN = "records.test_callbacks:"


def note(record, run, word="called", fails=0, ends=False):
    """Writes what it is given, and what is in metrics.jsonl by then."""
    if record["round"] == fails:
        raise SystemExit(4) if ends else LookupError("no such\nproject")
    last = read_metrics(run.root)[-1]
    with open(run.root / "noted.jsonl", "a") as file:
        same = last == {**record, "crc32": last.get("crc32")} or last == record
        print(json.dumps([word, record["round"], run.rounds, run.metric, run.resumed, same]), file=file)
    record["loss"] = record["silos"]["s0"]["loss"] = -1.0
    record["cohort"].clear()


def without_run(record):
    """It takes too little."""


NO_FUNCTION = 3


def noted(out):
    return [json.loads(line) for line in (out / "noted.jsonl").read_text().splitlines()]


def test_a_callback_gets_a_copy_of_every_record_that_is_in_metrics_jsonl(tmp_path):
    plain, _ = run(config(tmp_path / "plain", 3))
    how = config(tmp_path / "with", 3, callbacks=[OWN + "note", {"name": OWN + "note", "word": "second"}])
    assert build(Config, to_dict(how)) == how
    records, _ = run(how)
    assert [figures(record) for record in records] == [figures(record) for record in plain]
    wanted = [[word, r, 3, "accuracy", 0, True] for r in (1, 2, 3) for word in ("called", "second")]
    assert noted(tmp_path / "with") == wanted
    shas = [results.inspect(tmp_path / out)["params_sha256"] for out in ("plain", "with")]
    assert shas[0] == shas[1]


@pytest.mark.parametrize("ends", [False, True])
def test_a_callback_that_raises_is_told_in_one_line_and_called_no_more(tmp_path, caplog, ends):
    failing = {"name": OWN + "note", "fails": 2, "ends": ends}
    records, _ = run(config(tmp_path, 3, callbacks=[failing, {"name": OWN + "note", "word": "other"}]))
    assert len(records) == 3 == len(read_metrics(tmp_path))
    assert [(word, r) for word, r, *_ in noted(tmp_path)] == [("called", 1), *(("other", r) for r in (1, 2, 3))]
    said = [line for line in caplog.messages if "callback" in line]
    what = "SystemExit: 4" if ends else "LookupError: no such project"
    assert len(said) == 1 and re.fullmatch(
        rf"callback '{OWN}note' raised {what} \(.*test_callbacks.py, line \d+\) in round 2; it is called no more, and "
        "training goes on",
        said[0],
    )


def test_callbacks_may_change_when_a_run_resumes(tmp_path):
    run(config(tmp_path, 4), rounds=2)
    run(config(tmp_path, 4, callbacks=[OWN + "note"]), rounds=2)
    run(config(tmp_path, 4))
    assert [(r, resumed) for _, r, _, _, resumed, _ in noted(tmp_path)] == [(3, 2), (4, 2)]


def test_a_function_can_be_added_to_a_run(tmp_path):
    with fedmpi.Run(config(tmp_path, 2), comm=SoloComm()) as started:
        rounds = iter(started)
        next(rounds)
        started.add_callback(note)
        next(rounds)
    assert [row[1] for row in noted(tmp_path)] == [2]
    assert Callback(note).name == f"{__name__}:note"


@pytest.mark.parametrize(
    ("callback", "why"),
    [
        (OWN + "nte", "callbacks.0: cannot import 'records.test_callbacks:nte': .*; did you mean 'note'?"),
        (OWN + "NO_FUNCTION", f"callbacks.0: '{OWN}NO_FUNCTION' is no function"),
        ("fedmpi.records:Sink", "callbacks.0: 'fedmpi.records:Sink' is no function; classes are for records.sinks"),
        (OWN + "without_run", r"is called with \(record, run\) and its options: too many positional arguments"),
        ({"name": OWN + "note", "wrd": 1}, f"'{OWN}note' has no 'wrd'; did you mean 'word'?"),
        ("note", "callbacks.0: 'note' names no function; write it as 'module:function'"),
        ({"word": "x"}, "callbacks.0: None names no function"),
        (note, "a configuration names functions; give this one to Run.add_callback"),
    ],
)
def test_what_is_no_callback_is_refused_in_one_line(callback, why):
    with pytest.raises(ConfigError, match=why) as caught:
        build(Config, {"callbacks": [callback]})
    assert "\n" not in str(caught.value)


def test_a_run_directory_may_not_name_a_callback_unless_it_is_allowed(tmp_path):
    run(config(tmp_path, 1, callbacks=[OWN + "note"]))
    with confined(tmp_path), pytest.raises(ConfigError, match="--allow"):
        load(tmp_path)
    with confined(tmp_path, ["records", "support"]):
        assert load(tmp_path)[0].callbacks[0].name == OWN + "note"


def test_the_code_of_a_callback_is_kept_with_the_run(tmp_path):
    run(config(tmp_path, 1, callbacks=[OWN + "note"]))
    assert (tmp_path / "code/records/test_callbacks.py").exists()


def test_the_servers_job_calls_it_and_silos_need_not_name_it(tmp_path):
    how = apart(tmp_path, 2, callbacks=[OWN + "note"])
    records, _, _ = trained_apart(how)
    assert len(records) == 2 and [row[1] for row in noted(tmp_path / "run")] == [1, 2]
