"""An inspection says what its measurements say: in choices, in words, as JSON and as a page."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine.policy import Code, Keep, Policy, Reverse, Store
from abyssal.inspection.inspection import TOLERANCES, Choice, Inspection, inspection_of
from abyssal.inspection.page import build_page
from abyssal.inspection.rows import in_words, number, rows_of, said, span
from abyssal.inspection.text import as_text
from abyssal.planning.cost import CostModel
from abyssal.planning.measurements import Measurements
from abyssal.report.depth_plots import Stretch
from abyssal.report.heat import Choices, heat_map
from abyssal.report.page import write
from abyssal.report.plots import SHADES
from abyssal.util.files import write_whole
from toys import browser
from toys import inspection as toys

NETWORKS: dict[str, Callable[[], Measurements]] = {
    "two blocks": toys.two_blocks,
    "a ConvNeXt": toys.convnext,
    "a GPT": toys.gpt,
    "60 layers": lambda: toys.gpt(60, dtype="bfloat16"),
    "500 layers": lambda: toys.gpt(500, dtype="bfloat16"),
}


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n == "500 layers")) for n in NETWORKS]
)
def inspection(request: pytest.FixtureRequest) -> Inspection:
    return inspection_of(NETWORKS[request.param](), model=request.param)


# ---------------------------------------------------------------------- choices


@pytest.mark.slow
def test_every_choice_is_predicted_within_its_tolerance(inspection: Inspection) -> None:
    for choice in inspection.choices:
        assert choice.gradient_error <= choice.tolerance
        assert len(choice.policies) == len(choice.block_bytes) == len(inspection.blocks)


def test_nothing_on_the_front_is_beaten_by_another_point_or_by_a_choice(inspection: Inspection) -> None:
    for (size, error), (larger, smaller) in itertools.pairwise(inspection.front):
        assert size < larger
        assert error > smaller
    for choice in (*inspection.choices, *inspection.uniform.values()):
        assert any(size <= choice.stream_bytes and error <= choice.gradient_error for size, error in inspection.front)


def test_the_ends_of_chains_are_counted(inspection: Inspection) -> None:
    ends = {block.chain: block.stream_bytes for block in inspection.blocks}
    assert min(size for size, _ in inspection.front) >= sum(ends.values())


def test_the_choices_come_by_tolerance_and_none_is_larger_than_keeping(inspection: Inspection) -> None:
    assert [choice.tolerance for choice in inspection.choices] == sorted(TOLERANCES, reverse=True)
    assert all(choice.stream_bytes <= inspection.kept_bytes for choice in inspection.choices)


def test_no_code_for_all_blocks_within_the_tolerance_is_cheaper_than_the_choice(inspection: Inspection) -> None:
    def cost(choice: Choice) -> float:
        return choice.stream_bytes / inspection.kept_bytes + 0.1 * choice.step_ratio

    for choice in inspection.choices:
        alike = [c for c in inspection.uniform.values() if c.gradient_error <= choice.tolerance]
        # The search gives up gains below 1 % for a simpler choice.
        assert all(cost(choice) <= 1.01 * cost(c) for c in alike)


@pytest.mark.parametrize("wrong", [(), (0.0,), (1e-2, -1.0), (math.nan,), (math.inf,)])
def test_tolerances_that_are_none_are_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="numbers above 0"):
        inspection_of(toys.two_blocks(), wrong)


def test_bf16_bytes_are_half_of_a_float32_stream_and_all_of_a_bf16_one() -> None:
    single, half = (inspection_of(toys.gpt(4, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert single.bf16_bytes * 2 == single.kept_bytes
    assert half.bf16_bytes == half.kept_bytes == single.bf16_bytes


# ---------------------------------------------------------------------- words


def test_rows_cover_every_block_once_and_join_only_what_is_alike(inspection: Inspection) -> None:
    rows = rows_of(inspection, most=12)
    assert [i for row in rows for i in range(row.first, row.last + 1)] == list(range(len(inspection.blocks)))
    for row in rows:
        assert len({b.chain for b in inspection.blocks[row.first : row.last + 1]}) == 1
    assert len(rows) <= max(12, len({b.shape for b in inspection.blocks}))


@pytest.mark.slow
def test_a_block_that_cannot_be_reversed_is_not_hidden_in_a_row() -> None:
    inspection = inspection_of(toys.gpt(60))
    first = rows_of(inspection, most=5)[0]
    assert (first.first, first.last) == (0, 0)


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_table_fits(inspection: Inspection, width: int) -> None:
    lines = as_text(inspection, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 60
    assert "…" not in "".join(lines)  # nothing cut off
    for choice in inspection.choices:
        assert any(f"≤ {choice.tolerance:.0e}".replace("e-0", "e-") in line for line in lines)


@pytest.mark.slow
def test_what_was_measured_counts_and_aims_are_lowered_until_it_is_within_the_tolerance() -> None:
    found = toys.gpt(8)
    asked: list[float] = []

    def three_times_worse(policies: Mapping[str, Policy]) -> float:
        asked.append(3 * CostModel(found).of(policies).error)
        return asked[-1]

    measured = inspection_of(found, error_of=three_times_worse)
    for choice in measured.choices:
        assert choice.measured_error is not None
        assert choice.gradient_error == choice.measured_error <= choice.tolerance
        assert math.isclose(choice.measured_error, 3 * choice.predicted_error, rel_tol=1e-12)
    assert max(asked) > max(TOLERANCES)  # some were tried that were not good enough


def test_an_error_above_the_tolerance_is_marked() -> None:
    inspection = inspection_of(toys.gpt(4), [1e-2], error_of=lambda policies: 0.5)
    assert inspection.choices[0].gradient_error == 0.5
    assert "!0.50" in str(inspection)
    assert "more than the tolerance was measured" in " ".join(str(inspection).split())


def test_print_gives_the_table() -> None:
    inspection = inspection_of(toys.two_blocks(), model="two blocks")
    assert str(inspection) == as_text(inspection)


@pytest.mark.slow
def test_the_verdict_names_the_block_that_cannot_be_reversed() -> None:
    hazard, saving = inspection_of(toys.gpt()).verdict
    assert hazard.startswith("model.layers.0 adds an increment 3")
    assert "every other block can" in hazard
    assert "Within a gradient error of 1e-2" in saving


def test_the_verdict_says_what_contracts_and_what_does_not() -> None:
    found = toys.gpt(4)
    good = toys.measured(list(found.blocks[1:]))
    assert inspection_of(good).verdict[0].startswith("Each of the 3 blocks can be reversed")
    stuck = [replace(block, contraction=2.0) for block in found.blocks]
    assert inspection_of(toys.measured(stuck)).verdict[0].startswith("None of the 4 blocks can be reversed")
    half = inspection_of(toys.measured([*stuck[:2], *found.blocks[2:]])).verdict[0]
    assert half.startswith("2 of 4 blocks cannot be reversed (model.layers.0 and model.layers.1)")


def test_the_verdict_does_not_promise_a_saving_where_there_is_none() -> None:
    found = toys.two_blocks()
    only = tuple(
        replace(b, candidates=tuple(c for c in b.candidates if isinstance(c.policy, Keep | Store)))
        for b in found.blocks
    )
    inspection = inspection_of(replace(found, blocks=only))
    assert inspection.verdict[1] == "Within a gradient error of 1e-2 nothing smaller than keeping was found."
    assert "none of them smaller" in build_page(inspection).title


def test_notes_of_blocks_and_of_the_caller_are_shown() -> None:
    found = toys.two_blocks()
    noted = replace(found, blocks=tuple(replace(b, notes=("routes tokens",)) for b in found.blocks))
    text = " ".join(str(inspection_of(noted).with_notes("The weights are RANDOM.")).split())
    assert "blocks.0 and blocks.1: routes tokens" in text
    assert "The weights are RANDOM." in text
    assert "bfloat16 autocast gave no finite gradient" in text


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ((Keep(), Keep()), "keep"),
        ((Code(4), Code(4)), "4 bit"),
        ((Code(2), Code(4), Code(3)), "2–4 bit"),
        ((Code(2, refine=1),), "2 bit +1"),
        ((Code(2, refine=1), Code(4)), "2–4 bit"),
        ((Code(8), Keep(), Reverse(1)), "8 bit/rev/keep"),
        ((None, Code(8)), "8 bit/free"),
        ((Code("auto"),), "auto bit"),
        ((Code(4, device="cpu"),), "4 bit cpu"),
    ],
)
def test_policies_in_a_few_characters(policies: tuple[Any, ...], words: str) -> None:
    assert in_words(policies) == words


@given(st.floats(min_value=0, allow_nan=False))
def test_a_number_is_short_and_near_the_value(value: float) -> None:
    text = number(value)
    assert len(text) <= 8
    if math.isfinite(value) and value < 1e300:  # 2e308 reads back as infinite
        # One digit (from 1e4) is off by half of its unit at most, on a leading digit of at least 1.
        assert math.isclose(float(text), value, rel_tol=0.5, abs_tol=0.0 if value > 1e-300 else 1e-300)


def test_spans_and_lists_of_names() -> None:
    assert span([0.1, None, 0.101, math.nan]) == "0.10"
    assert span([0.05, 0.4, 28.0]) == "0.05–28"
    assert span([None, None]) == "-"
    assert said(["a"]) == "a"
    assert said(["a", "b", "c"]) == "a, b and c"
    assert said(list("abcdef")) == "a, b and 4 others"


# ---------------------------------------------------------------------- JSON


def test_the_dict_is_strict_json_and_holds_every_block(inspection: Inspection) -> None:
    data = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert [b["name"] for b in data["blocks"]] == [b.name for b in inspection.blocks]
    assert [t["tolerance"] for t in data["tolerances"]] == [c.tolerance for c in inspection.choices]
    for block, choice in itertools.product(range(len(inspection.blocks)), inspection.choices):
        assert data["blocks"][block]["best"][f"{choice.tolerance:g}"]["policy"] == str(choice.policies[block])


def test_what_is_not_finite_becomes_null() -> None:
    found = toys.two_blocks()
    wild = [replace(found.blocks[0], contraction=math.inf, increment_ratio=math.nan), found.blocks[1]]
    data = inspection_of(toys.measured(wild)).to_dict()
    assert data["blocks"][0]["contraction"] is None
    assert data["blocks"][0]["increment_ratio"] is None
    json.dumps(data, allow_nan=False)


# ---------------------------------------------------------------------- the map

SVG = "{http://www.w3.org/2000/svg}"


def draw(values: list[list[float | None]], **options: Any) -> ElementTree.Element:
    names = [f"policy {i}" for i in range(len(values))]
    columns = [f"block {i}" for i in range(len(values[0]))]
    text = heat_map(values, alt="a map", rows=names, columns=columns, title="error", exponents=(-5, 0), **options)
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" '))


def cells_of(svg: ElementTree.Element) -> list[ElementTree.Element]:
    """The cells that are drawn one by one, each with a title, row by row."""
    return [g for g in svg.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]


def styles_of(svg: ElementTree.Element) -> list[str]:
    return [str(path.get("style")) for path in svg.iter(f"{SVG}path")]


def shades_of(*values: float | None) -> list[str]:
    """What fills the cells of a row: the number of a shade, "none" where it is exact."""
    found = []
    for cell in cells_of(draw([list(values)])):
        (style,) = styles_of(cell)
        fill = re.search(r"fill: (?:var\(--heat-(\d+)\)|(none))", style)
        assert fill is not None
        found.append(fill[1] or fill[2])
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(min_value=1e-8, max_value=1e3), min_size=2, max_size=16))
def test_a_larger_error_is_never_paler(values: list[float]) -> None:
    shades = [int(shade) for shade in shades_of(*sorted(values))]
    assert len(shades) == len(values)
    assert shades == sorted(shades)


def test_exact_missing_and_infinite_cells_look_different_from_small_errors() -> None:
    darkest = f"{SHADES - 1}"
    assert shades_of(0.0, None, math.inf, math.nan, 1e-9) == ["none", darkest, darkest, "0"]


def rectangles(path: ElementTree.Element) -> list[tuple[float, ...]]:
    """(left, top, width, height) of the rectangles of a path."""
    found = []
    for around in str(path.get("d")).split("z")[:-1]:
        corners = [tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", around)]
        x, y = zip(*corners, strict=True)
        found.append((min(x), min(y), max(x) - min(x), max(y) - min(y)))
    return found


def test_outlines_surround_the_chosen_cells_and_later_ones_lie_inside() -> None:
    rows = [0, 1, 1]
    svg = draw([[1e-3] * 3] * 2, choices=[Choices("loose", rows, 1), Choices("strict", [1, 1, 1], 2)], width=430)
    cells = [rectangles(cell.findall(f"{SVG}path")[0])[0] for cell in cells_of(svg)]
    loose, strict = (
        next(rectangles(path) for path in svg.iter(f"{SVG}path") if f"stroke: var({name})" in str(path.get("style")))
        for name in ("--series-1", "--series-2")  # the legend's come last
    )
    assert len(loose) == 2  # one of a single cell, one of two side by side
    assert len(strict) == 2  # parted where it shares its cells with the first choice
    shared_outer, shared_inner = loose[1], strict[1]
    assert shared_outer[0] < shared_inner[0]
    assert shared_outer[1] < shared_inner[1]
    assert shared_outer[2] > shared_inner[2]
    for j, row in enumerate(rows):
        left, top, wide, high = cells[row * 3 + j]
        assert any(
            x - 1 <= left and y - 1 <= top and x + w + 2 >= left + wide and y + h + 2 >= top + high
            for x, y, w, h in loose
        )


def test_many_columns_are_joined_and_the_worst_of_each_is_shown() -> None:
    values: list[list[float | None]] = [[1e-4] * 2000]
    values[0][1001] = 0.5
    svg = draw(values, width=385)
    darkest = f"fill: var(--heat-{int((math.log10(0.5) + 5) / 5 * SHADES)})"
    assert sum(darkest in style for style in styles_of(svg)) == 2  # of a column of the map, and of the scale
    assert any("to a column, the worst of them shown" in (t.text or "") for t in svg.iter(f"{SVG}text"))


def test_a_map_whose_names_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        heat_map([[1.0]], alt="", rows=["a"], columns=["b", "c"], title="", exponents=(-5, 0))


def test_stretches_are_named_where_they_fit() -> None:
    stretches = [Stretch("first", 0, 10), Stretch("x", 10, 1), Stretch("a name of many words", 11, 1)]
    svg = draw([[1e-3] * 12], stretches=stretches)
    texts = {t.text for t in svg.iter(f"{SVG}text")}
    assert "first" in texts
    assert "a name of many words" not in texts


# ---------------------------------------------------------------------- the page


def test_the_page_asks_nothing_of_the_network_and_its_ids_are_unique(inspection: Inspection, tmp_path: Path) -> None:
    text = inspection.with_notes("A note.").to_html(tmp_path / "page.html").read_text()
    assert "://" not in text
    assert not re.findall(r"@import|<script|<iframe|<link(?! rel=\"icon\" href=\"data:,\")|url\((?!#)", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert text.count("A note.") == 2  # above the plots and below the table
    assert inspection.blocks[-1].name.rpartition(".")[2] in text


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    found = toys.two_blocks()
    named = toys.measured([replace(b, name=f"<b>&{i}") for i, b in enumerate(found.blocks)])
    text = inspection_of(named, model="<i>model").to_html(tmp_path / "page.html").read_text()
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;&amp;0" in text


def test_wild_figures_make_a_page_all_the_same(tmp_path: Path) -> None:
    found = toys.gpt(4)
    blocks = (
        replace(found.blocks[0], contraction=math.inf, increment_ratio=math.inf, regularity=math.nan),
        replace(found.blocks[1], contraction=math.nan, increment_ratio=0.0),
        *found.blocks[2:],
    )
    inspection = inspection_of(replace(found, blocks=blocks, keep_seconds=0.0))
    inspection.to_html(tmp_path / "page.html")
    assert "model.layers.0" in str(inspection)


def test_one_block_is_enough(tmp_path: Path) -> None:
    found = toys.two_blocks()
    inspection = inspection_of(toys.measured(list(found.blocks[:1])))
    inspection.to_html(tmp_path / "page.html")
    assert "The only block can be reversed" in str(inspection)


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write(build_page(inspection_of(toys.two_blocks())), page)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert page.read_text() == "old"


def test_writing_whole_replaces_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "one")
    write_whole(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.browser
@pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_reads_well_at(inspection: Inspection, width: int, tmp_path: Path) -> None:
    page = inspection.with_notes("The weights are RANDOM.").to_html(tmp_path / "page.html")
    seen = browser.look(page, width, tmp_path)
    assert seen["requests"] == []
    assert seen["scroll_width"] <= width
    shown = [box for box in seen["plots"] if box[0] > 0]
    assert len(shown) == (3 if len(inspection.blocks) < 4 else 4)
    assert all(plot_width > 0.6 * min(width, 500) and height > 150 for plot_width, height in shown)
    assert not any(seen["texts"]), "text runs out of a plot"
