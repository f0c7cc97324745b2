"""What README.md and docs/ say about speed and memory is what benchmarks/results has."""

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
    kept = readme.results("memory")["bytes_kept"]
    elu, maxout = kept["elu"], kept["maxout of 2"]
    claim = (
        f"keeps {elu['mlpext']:g} bytes a value for backward where torch keeps {elu['eager']:g} "
        f"(elu, leaky_relu, selu, celu), and for maxout {maxout['mlpext']:g} "
        f"where torch keeps {maxout['eager']:g}."
    )
    assert claim in " ".join(PAGES["README.md"].split())
    assert all(kept[name] == elu for name in ("leaky_relu", "selu", "celu"))
    assert kept["maxout of 4"] == maxout
