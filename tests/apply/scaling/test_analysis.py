"""Sweeps that were made by a known law: the law is found, with its crossovers, and nothing else is said."""

import csv
import io
import json

import pytest

from cctrain.apply.scaling import figures
from cctrain.apply.scaling.analysis import analyse
from cctrain.apply.scaling.figures import draw_figures
from cctrain.apply.scaling.report import crossover_in_words, csv_text, report_text
from tests.apply.scaling.sweeps import LATENTS, PER_PAIR, PER_SQUARE, PER_TOKEN, a_plan, a_row, rows_of, settings

MACHINE = settings()["machine"]


@pytest.fixture(scope="module")
def rows() -> dict:
    return rows_of(a_plan())


@pytest.fixture(scope="module")
def found(rows) -> dict:
    return analyse(rows.values())


@pytest.fixture(scope="module")
def with_a_term_of_tokens(rows) -> list:
    """Attention that takes PER_TOKEN more for every token."""
    return [row | {"attention_seconds": row["attention_seconds"] + PER_TOKEN * row["tokens"]} for row in rows.values()]


def test_attention_has_exponent_1_in_each_of_n_and_m_and_2_in_dense(found):
    laws = found["attention"]
    for name in ("n·M", "n", "M", "n, M = 64", "M, n = 4,096"):
        assert laws[name]["exponent"] == pytest.approx(1), name
    assert laws["n, dense, same depth"]["exponent"] == pytest.approx(2)
    assert laws["n·M"]["points"] == 4 * 3


@pytest.fixture(scope="module")
def in_rounds(rows) -> dict:
    """Times that grow as (n·M)^1 in the first round, and by n^0.5 more in the second."""
    return {
        key: row | {"attention_by_round": [row["attention_seconds"], row["attention_seconds"] * row["tokens"] ** 0.5]}
        for key, row in rows.items()
    }


def test_each_round_has_exponents_of_its_own(in_rounds):
    found = analyse(in_rounds.values())
    assert found["exponents_by_round"]["n"] == pytest.approx([1, 1.5])
    assert found["exponents_by_round"]["M"] == pytest.approx([1, 1])
    assert 1 < found["exponents_by_round"]["n·M"][1] < 1.5
    assert "of n 1.000, 1.500; of M 1.000, 1.000." in report_text([], found, settings(), [])


@pytest.mark.parametrize("of_one", [{}, {"attention_by_round": [1.0]}, {"attention_by_round": [1.0, None]}])
def test_rounds_that_lack_a_point_have_no_exponents(in_rounds, of_one):
    key = "criss-cross, M = 64, n = 8192"
    row = {name: value for name, value in in_rounds[key].items() if name != "attention_by_round"} | of_one
    found = analyse((in_rounds | {key: row}).values())
    assert found["exponents_by_round"] == {}
    assert "By each round" not in report_text([], found, settings(), [])


def test_contexts_below_the_shortest_are_in_no_exponent_but_in_the_law_of_the_step(rows):
    slow_start = rows | {"criss-cross, M = 32, n = 1024": rows["criss-cross, M = 32, n = 1024"] | {"step_seconds": 9.0}}
    with_start, without = analyse(slow_start.values()), analyse(rows.values())
    assert with_start["attention"] == without["attention"]
    assert with_start["total"]["criss-cross"] != without["total"]["criss-cross"]


def test_what_a_token_takes_however_few_the_latents_is_told_apart_from_what_its_pairs_take(with_a_term_of_tokens):
    laws = analyse(with_a_term_of_tokens)["attention_terms"]
    for name, square, of_a_square in (
        ("criss-cross", "n·M", PER_PAIR),
        ("dense, same depth", "n²", PER_SQUARE),
        ("dense, same parameters", "n²", 2 * PER_SQUARE),
    ):
        values = {term: coefficient["value"] for term, coefficient in laws[name]["coefficients"].items()}
        assert values == {square: pytest.approx(of_a_square), "n": pytest.approx(PER_TOKEN)}, name
    assert laws["criss-cross"]["points"] == 5 * 3


def test_with_latents_of_one_number_what_pairs_take_and_what_tokens_take_are_not_told_apart():
    rows = rows_of(a_plan(latents=[64]))
    assert analyse(rows.values())["attention_terms"]["criss-cross"] is None


def test_the_law_of_the_whole_step_is_found(found):
    coefficients = {term: c["value"] for term, c in found["total"]["criss-cross"]["coefficients"].items()}
    assert coefficients["n·M"] == pytest.approx(PER_PAIR)
    assert coefficients["n"] == pytest.approx(PER_TOKEN)
    assert found["total"]["dense, same depth"]["coefficients"]["n²"]["value"] == pytest.approx(PER_SQUARE)


def test_a_crossover_with_dense_is_found_where_the_laws_meet(found):
    # PER_PAIR · M + PER_TOKEN = PER_SQUARE · n + PER_TOKEN / 2
    [crossing] = [c for c in found["crossovers"] if (c["latents"], c["against"]) == (128, "same_depth")]
    assert crossing["verdict"] == "measured"
    assert crossing["tokens"] == pytest.approx((PER_PAIR * 128 + PER_TOKEN / 2) / PER_SQUARE, rel=0.03)


def test_without_short_contexts_the_crossover_is_extrapolated_and_the_words_say_so():
    found = analyse(rows_of(a_plan([8192, 16384, 32768, 65536])).values())
    crossing = found["crossovers"][0]
    assert crossing["verdict"] == "extrapolated"
    assert crossing["tokens"] == pytest.approx((PER_PAIR * 32 + PER_TOKEN / 2) / PER_SQUARE, rel=1e-3)
    assert "extrapolated by the laws; measured was 8,192 to 65,536" in crossover_in_words(crossing)


def test_where_laws_meet_between_measured_lengths_and_curves_do_not_cross_the_words_say_so():
    crossing = {"verdict": "fitted", "tokens": 1036.4, "from": 1024, "to": 65536, "by_laws": True}
    words = "from n = 1,036 on (where the laws meet; the curves, measured at 1,024 to 65,536, do not cross there)"
    assert crossover_in_words(crossing).endswith(words)


def test_context_ranks_enter_no_fit():
    rows = rows_of(a_plan(context_ranks=(1, 2)))
    assert analyse(rows.values()) == analyse(rows_of(a_plan()).values())


def test_a_sweep_of_nothing_says_that_there_are_too_few_points():
    found = analyse([a_row(a_plan().points[0], left_out="out of memory")])
    assert found["attention"]["n·M"] is None
    assert found["crossovers"] == []
    assert "too few points" in report_text([], found, settings(), [])


def test_fits_are_json_without_nan(found):
    json.dumps(found, allow_nan=False)


def test_the_report_has_how_far_each_exponent_is_from_theory(found):
    laws = {"n·M": found["attention"]["n·M"] | {"exponent": 0.91}}
    laws["n, dense, same depth"] = found["attention"]["n, dense, same depth"] | {"exponent": 2.04}
    text = report_text([], found | {"attention": laws}, settings(), [])
    assert "| n·M | 0.910 (1.000 to 1.000) | 1 | -0.090 | 1.0000 | 12 |" in text
    assert "| n, dense, same depth | 2.040 (2.000 to 2.000) | 2 | +0.040 | 1.0000 | 4 |" in text


def test_the_report_says_how_many_latents_take_as_long_as_a_token_does_without_any(with_a_term_of_tokens):
    text = report_text([], analyse(with_a_term_of_tokens), settings(), [])
    assert "| criss-cross | 1e-08 (1e-08 to 1e-08)·n·M + 2e-05 (2e-05 to 2e-05)·n | 1.0000 | 0.0% | 0.0% | 15 |" in text
    assert f"as much as {PER_TOKEN / PER_PAIR:.0f} latents more" in text


def test_where_a_token_takes_nothing_by_itself_the_report_does_not_explain_it(found):
    assert "however few the latents" not in report_text([], found, settings(), [])


def test_the_report_has_the_share_of_attention_beside_every_point(rows, found):
    text = report_text(rows.values(), found, settings(), ["figures/cost.png"])
    for row in rows.values():
        share = f"{row['attention_share_of_flops']:.1%} | {row['attention_share_of_time']:.1%}"
        assert any(
            line.startswith(f"| {row['name']} |") and f"| {row['tokens']:,} |" in line and share in line
            for line in text.splitlines()
        )
    assert "![figures/cost.png](figures/cost.png)" in text
    assert "Commit: abc" in text


def test_a_step_that_was_timed_once_the_first_time_is_marked_in_the_report(rows, found):
    key = "dense, same depth, n = 32768"
    timed_once = rows[key] | {"repeats": 1, "timings": rows[key]["timings"] | {"warm_up": 20.5, "steps": [20.5]}}
    lines = report_text((rows | {key: timed_once}).values(), found, settings(), []).splitlines()
    marked = [line for line in lines if " | the first | " in line]
    assert len(marked) == 1
    assert marked[0].startswith("| dense, same depth |")
    assert "| 32,768 |" in marked[0]
    assert any(line.startswith("`the first`: timed once") for line in lines)


def test_where_every_first_step_is_apart_none_is_marked(rows, found):
    text = report_text(rows.values(), found, settings(), [])
    assert "the first`" not in text
    assert f"| {next(iter(rows.values()))['step_seconds']:.4g} | 3 |" in text


def test_a_point_that_was_left_out_has_its_reason_and_no_time_in_report_and_table(rows, found):
    point = a_plan([65536]).points[0]
    more = rows | {point.key: a_row(point, left_out="out of memory")}
    assert "left out: out of memory" in report_text(more.values(), found, settings(), [])
    lines = list(csv.DictReader(io.StringIO(csv_text(more.values()))))
    assert len(lines) == len(more)
    [line] = [line for line in lines if line["left_out"]]
    assert line["step_seconds"] == line["memory_bytes"] == ""
    assert line["tokens"] == "65536"


def context_ranks_in_report(rows, found, machine=MACHINE) -> str:
    text = report_text(rows, found, settings() | {"machine": machine}, [])
    return text.partition("## Context ranks\n")[2].partition("\n## ")[0]


def test_the_report_has_time_memory_and_bytes_sent_of_each_context_on_one_rank_and_on_several(found):
    rows = rows_of(a_plan([4096, 8192], [32], context_ranks=(1, 2)))
    rows["criss-cross, M = 32, 2 context ranks, n = 8192"] |= {"step_seconds": 0.2, "attention_seconds": 0.05}
    table = [line for line in context_ranks_in_report(rows.values(), found).splitlines() if line.startswith("| 32 |")]
    # Of 2 layers of width 16 with 2 heads: 4 bytes · 32 latents · (16 + 2) gathered, and · 16 reduced.
    sent = 2 * 4 * 32 * (18 + 16)
    assert table == [
        f"| 32 | 4,096 | 2 | 0.08323 | 0.04162 | 2.00 | 0.001311 | 0.0006554 | {sent:,} | 8 | 4 | 0.50 |",
        f"| 32 | 8,192 | 2 | 0.1665 | 0.2 | 0.83 | 0.002621 | 0.05 | {sent:,} | 16 | 8 | 0.50 |",
    ]


def test_the_report_tells_what_the_sum_of_the_gradients_sends_apart(found):
    rows = rows_of(a_plan([4096], [32, 64], context_ranks=(1, 2)))
    parameters = max(row["parameters"] for row in rows.values() if row["context_ranks"] == 2)
    assert f"sends up to {4 * parameters:,} more" in context_ranks_in_report(rows.values(), found)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"device": "cpu", "threads": 4}, "(threads: 4 for one rank, 2 for each of 2). These are as many cores in all"),
        ({"device": "cpu", "threads": 3}, "(threads: 3 for one rank, 1 for each of 2). These are not as many cores"),
        ({"device": "cuda", "threads": 4}, "(a GPU for each rank). As many times as fast as there are ranks"),
    ],
)
def test_the_report_says_whether_one_rank_and_several_had_as_many_cores(found, machine, said):
    rows = rows_of(a_plan([4096], [32], context_ranks=(1, 2)))
    assert said in context_ranks_in_report(rows.values(), found, machine)


def test_contexts_that_were_not_measured_on_one_rank_and_on_several_are_not_compared(rows, found):
    shared = rows_of(a_plan([2048], context_ranks=(2,)))
    assert context_ranks_in_report((rows | shared).values(), found) == ""


def test_every_figure_is_drawn_as_png_and_svg(tmp_path, found):
    rows = rows_of(a_plan([1024, 4096], context_ranks=(1, 2)))
    drawn = draw_figures(rows.values(), found, MACHINE, tmp_path)
    assert [path.stem for path in drawn] == ["cost", "collapse", "memory", "time", "context_ranks"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in path.with_suffix(".svg").read_text()


def test_the_fitted_time_of_a_pair_is_dashed_beside_the_measured_ones(tmp_path, with_a_term_of_tokens, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    draw_figures(with_a_term_of_tokens, analyse(with_a_term_of_tokens), MACHINE, tmp_path)
    of_a_pair = drawn[1].axes[1].lines
    dashed = [line.get_ydata()[0] for line in of_a_pair if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([1e9 * (PER_PAIR + PER_TOKEN / latents) for latents in LATENTS])


def test_contexts_on_one_rank_and_on_several_are_drawn_with_time_and_memory(tmp_path, found, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    rows = rows_of(a_plan([1024, 4096], [32, 64], context_ranks=(1, 2)))
    draw_figures([*rows.values(), *rows_of(a_plan([8192], [32])).values()], found, MACHINE, tmp_path)
    seconds, memory = drawn[-1].axes
    assert "threads: 2 for one rank, 1 for each of 2" in seconds.get_title()
    for axes, key, unit in ((seconds, "step_seconds", 1), (memory, "memory_bytes", 2**20)):
        lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
        assert lines.keys() == {f"M = {m}, {ranks}" for m in (32, 64) for ranks in ("1 rank", "2 ranks")}
        of_two = {n: rows[f"criss-cross, M = 64, 2 context ranks, n = {n}"][key] / unit for n in (1024, 4096)}
        assert lines["M = 64, 2 ranks"] == of_two


def test_where_nothing_was_measured_nothing_is_drawn(tmp_path, found):
    assert draw_figures([a_row(a_plan().points[0], left_out="out of memory")], found, MACHINE, tmp_path) == []
