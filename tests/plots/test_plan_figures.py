"""plots/plan_figures.py: what is said is there, and within the picture."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from dag.exact_arithmetic import OPERATIONS
from inference.explain import Candidate, Number, Step, Thought
from inference.token_stats import Choice
from plots.plan_figures import FAINT, INK, draw_dag, draw_heatmap, shortened, shortened_number

LONG = "123456789012345678901234567890123456"
EVEN = {name: 1 / len(OPERATIONS) for name in OPERATIONS}
TEXTS = ["12", "+", "7", "*", "3", "=", "33", "\n"]
SHORT = Thought(
    position=5,
    first=6,
    last=6,
    text="33",
    expression="12 + (7 * 3 = 21) = 33",
    written="33",
    followed=True,
    format="exact",
    probability=0.98,
    gate=0.93,
    inputs=(Number(0, "3", 4, 4), Number(1, "7", 2, 2), Number(2, "12", 0, 0)),
    steps=(
        Step(8, "multiply", (1, 0), "21", {"multiply": 0.9, "add": 0.1}, ({1: 0.995, 0: 0.005}, {0: 1.0})),
        Step(9, "add", (2, 8), "33", {"add": 1.0}, ({2: 0.75, 1: 0.25}, {8: 1.0})),
    ),
    result=9,
    alternatives=(Candidate("12 + 7 = 19", "19", 0.02),),
)
COPY = Thought(5, 6, 6, "$12_3$", "12 = 12", "12", False, "places_2", 0.5, 0.5, SHORT.inputs, (), 2, ())
DEEP = Thought(
    position=5,
    first=6,
    last=6,
    text=LONG,
    expression=f"log({LONG} * {LONG} = {LONG}) = nothing",
    written=None,
    followed=False,
    format="digits_12",
    probability=0.1,
    gate=0.5,
    inputs=tuple(Number(slot, LONG, 0, 0) for slot in range(8)),
    steps=(
        Step(8, "multiply", (5, 7), LONG, EVEN, ({slot: 1 / 8 for slot in range(8)}, {7: 1.0})),
        Step(9, "subtract", (6, 6), "-" + LONG, EVEN, ({6: 1.0}, {6: 0.5, 8: 0.5})),
        Step(10, "power", (8, 9), None, {}, ()),
        Step(11, "log", (10,), None, EVEN, ({10: 0.5, 0: 0.5},)),
    ),
    result=11,
    alternatives=(Candidate(f"{LONG} ^ " * 8 + "= nothing", None, 1e-9),),
)


def words(figure) -> str:
    return "\n".join(text.get_text() for text in figure.axes[0].texts)


def extents(figure) -> list:
    figure.canvas.draw()
    return [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]


def test_the_graph_tells_the_thought():
    figure = draw_dag([SHORT], TEXTS)
    told = words(figure).split("\n")
    assert [text for text in told if text in ("12", "7", "3", "21", "33")].count(
        "33"
    ) == 3  # title, step, result
    assert {"12", "7", "3", "21", "12+7*3=", "exact"} <= set(told)
    assert {"multiply 90%", "or add 10%", "75%", "25%", "gate 93%, plan 98%"} <= set(told)
    assert "next best: 12 + 7 = 19, 2%" in told
    assert "12+\u20397\u203a*3=33" in told
    assert not any("0.5%" in text for text in told)  # rejected, and not notable
    assert "the text" not in words(figure)
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    assert len(boxes) == 3 + 2 + 1


def test_boxes_stand_behind_what_they_are_computed_from():
    figure = draw_dag([SHORT], TEXTS)
    at = {text.get_text(): text.get_position() for text in figure.axes[0].texts if text.get_fontsize() == 10}
    assert at["12"][0] == at["7"][0] == at["3"][0] < at["21"][0] < at["33"][0]
    assert at["12"][1] < at["7"][1] < at["3"][1]  # as in the text


def edges(figure) -> set[tuple[str, str, bool, str]]:
    """Names of the boxes that an arrow leads from and to, whether it is dashed, and its colour."""
    patches = figure.axes[0].patches
    boxes = [patch for patch in patches if isinstance(patch, FancyBboxPatch)]
    assert len(boxes) == 6  # in the order in which draw_panel makes them
    places = dict(zip(("3", "7", "12", "21", "33", "result"), map(corners, boxes)))
    found = set()
    for arrow in patches:
        if isinstance(arrow, FancyArrowPatch):
            (x, y), (to_x, to_y) = arrow.get_path().vertices[[0, 3]]
            (begin,) = [name for name, (_, at, top, end) in places.items() if near(x, at) and top < y < end]
            (head,) = [
                name for name, (at, _, top, end) in places.items() if near(to_x, at) and top < to_y < end
            ]
            found.add((begin, head, arrow.get_linestyle() != "-", to_hex(arrow.get_edgecolor())))
    return found


def corners(box):
    return box.get_x(), box.get_x() + box.get_width(), box.get_y(), box.get_y() + box.get_height()


def near(a, b):
    return abs(a - b) < 0.1  # inches; a line ends a little before its arrow's head does


def test_arrows_lead_from_operands_to_steps_and_from_the_last_to_the_result():
    chosen = [("7", "21"), ("3", "21"), ("12", "33"), ("21", "33"), ("33", "result")]
    drawn = {(*pair, False, INK) for pair in chosen}
    assert edges(draw_dag([SHORT], TEXTS)) == drawn | {("7", "33", True, FAINT)}  # instead of 12, 25 %


def test_what_the_text_says_instead_is_told():
    told = words(draw_dag([COPY], TEXTS))
    assert "the text: $12_3$" in told and "places_2" in told


def test_no_text_is_taken_for_a_formula():
    figures = draw_dag([COPY], TEXTS), draw_heatmap([Choice(0, "$x$", 1.0, 1, 0.0, (("$x$", 1.0),))])
    assert not any(text.get_parse_math() for figure in figures for text in figure.axes[0].texts)


@pytest.mark.parametrize("thoughts", [[SHORT], [COPY], [DEEP], [SHORT, COPY, DEEP]])
def test_nothing_of_a_graph_is_cut_off_or_covered(thoughts):
    figure = draw_dag(thoughts, ["a long text before it $ " * 9, *TEXTS[1:]])
    width, height = figure.canvas.get_width_height()
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    figure.canvas.draw()
    areas = [box.get_window_extent() for box in boxes]
    assert not any(a.overlaps(b) for n, a in enumerate(areas) for b in areas[:n])
    for area in [*extents(figure), *areas]:
        assert 0 <= area.x0 and area.x1 <= width and 0 <= area.y0 and area.y1 <= height


def test_the_heatmap_frames_what_was_written():
    likeliest = tuple((str(n), 0.5 / 2**n) for n in range(10))
    told = [
        Choice(3, "3", 0.5 / 2**3, 4, 0.0, likeliest),
        Choice(0, "0", 0.5, 1, 0.0, likeliest),
        Choice(99, "\n", 1e-6, 30, 0.0, likeliest),
        Choice(98, "\u4e2d$", 1e-6, 30, 0.0, likeliest),
    ]
    figure = draw_heatmap(told, first=101)
    frames = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_facecolor()[3] == 0]
    frames = [frame for frame in frames if frame.get_linewidth() > 1]
    cells = [p for p in figure.axes[0].patches if p not in frames]
    assert len(cells) == 10 + 10 + 11 + 11
    columns = sorted({round(cell.get_x(), 3) for cell in cells})
    assert [columns.index(round(frame.get_x(), 3)) for frame in frames] == [3, 0, 10, 10]
    rows = [frame.get_y() for frame in frames]
    assert rows == sorted(set(rows))
    assert {"101", "104", "\u21b5", "<0.1%", "50%", "beyond"} <= set(words(figure).split("\n"))
    assert "\\u4e2d$" in words(figure).split("\n")  # the font has no such character
    width, height = figure.canvas.get_width_height()
    for area in extents(figure):
        assert 0 <= area.x0 and area.x1 <= width and 0 <= area.y0 and area.y1 <= height


def test_long_texts_lose_their_middle():
    assert [shortened("123456789", n) for n in (4, 5, 9)] == ["12\u20269", "12\u202689", "123456789"]
    numbers = {"1.79175946": "1.791\u2026", "1234567/7654321": "1\u20267/7\u20261", "123456.5": "123\u2026.5"}
    for number, short in numbers.items():
        assert shortened_number(number, 6 if "/" not in number else 7) == short
    assert shortened_number("1/3", 3) == "1/3"
