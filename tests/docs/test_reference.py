"""The pages of the configuration reference are those that jobs/reference.py makes from the code."""

import importlib.util
from pathlib import Path

TOP = Path(__file__).parents[2]


def test_the_configuration_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("reference", TOP / "jobs/reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for path, text in reference.pages().items():
        assert path.exists() and path.read_text() == text, f"{path} is stale; run: python jobs/reference.py"
