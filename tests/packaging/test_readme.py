"""What README.md and docs/ say about speed and memory is what benchmarks/results has."""

import json

import pytest

import readme

PAGES = {page: (readme.ROOT / page).read_text() for page in readme.PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page):
    """`make readme` would change nothing."""
    assert readme.filled(PAGES[page]) == PAGES[page]


def test_every_table_stands_somewhere():
    assert not [name for name in readme.TABLES if f"<!-- table: {name} -->" not in "".join(PAGES.values())]


def test_bytes_in_the_first_paragraph_are_those_of_the_results():
    kept = json.loads((readme.RESULTS / "memory.json").read_text())["bytes_kept"]
    elu, maxout = kept["elu"], kept["maxout of 2"]
    claim = (
        f"keeps {elu['mlpext']:g} bytes a value for backward where torch keeps {elu['eager']:g} "
        f"(elu, leaky_relu, selu, celu), and for maxout {maxout['mlpext']:g} "
        f"where torch keeps {maxout['eager']:g}."
    )
    assert claim in " ".join(PAGES["README.md"].split())
    assert all(kept[name] == elu for name in ("leaky_relu", "selu", "celu"))
    assert kept["maxout of 4"] == maxout


def test_cpus_stand_side_by_side(tmp_path, monkeypatch):
    """A column of ratios for each CPU, nothing where one of them has no such case, one of targets."""

    def case(name, ratio):
        return {"name": name, "ratios": {"eager": {"median": ratio}}, "target": {"eager": 2}}

    setting = {"date": "2026-11-28", "cpu": "a CPU", "torch_isa": "AVX2", "threads": 1, "load_before": 0.5}
    setting |= {"cpus_in_machine": 2, "versions": {"torch": "2.13.0"}}
    for cpu, cases in {
        "zen-4": [case("float32 u", 1.5), case("float32 v", 1.25)],
        "cascade-lake": [case("float32 u", 0.5)],
    }.items():
        (tmp_path / cpu).mkdir()
        (tmp_path / cpu / "some.json").write_text(json.dumps({"setting": setting, "cases": cases}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    table = readme.listed(
        "some", "dtype | which", r"(\w+) (\w)", readme.ratio("eager"), readme.target("eager")
    )
    assert table.splitlines()[:4] == [
        "| dtype | which | ratio, Cascade Lake | ratio, Zen 4 | target |",
        "| --- | --- | --- | --- | --- |",
        "| float32 | u | 0.50 | 1.50 | 2 |",
        "| float32 | v | | 1.25 | 2 |",
    ]
    crossed = readme.crossed("some", "which", r"float32 (\w)")
    assert crossed.splitlines()[0] == "| which | float32, Cascade Lake | float32, Zen 4 |"
    assert crossed.splitlines()[3] == "| v | | 1.25 |"
