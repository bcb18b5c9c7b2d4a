"""Pictures of what a model had in mind: graphs behind numbers (inference/explain.py), odds of tokens (inference/token_stats.py).

    look = explain(model, tokenizer, tokens)
    draw_dag(look.thoughts, [tokenizer.decode([token]) for token in tokens]).savefig("dag.png")
    draw_heatmap(choices(model, tokenizer, tokens)).savefig("heatmap.png")

Both return a matplotlib Figure that belongs to no window. Lengths are inches, the origin is the upper left.
A PNG holds 2^16 pixels a side: draw long texts in parts, NUMBERS or STEPS each.
"""

import functools
from collections.abc import Sequence

from inference.explain import Number, Step, Thought
from inference.token_stats import LIKELIEST, Choice

NUMBERS, STEPS = 20, 100  # of a draw_dag, of a draw_heatmap: a picture of some 5,000 pixels
BOX, COLUMN, ROW = (1.36, 0.46), 2.2, 0.95  # of a box, width and height; from one to the next
MARGIN, TITLE, FOOT = 0.25, 0.55, 0.3
MONO, SMALL, LETTER = "DejaVu Sans Mono", 7, 0.602 / 72  # a letter of MONO is so wide at a size of one point
NOTABLE, MOST = 0.01, 2  # of the choices that were rejected, those at least so likely, and so many, are shown
INK, FAINT, INPUT, STEP, RESULT, WRONG = "#222222", "#8a8a8a", "#dbe7f6", "#f7f3e3", "#bfe3c6", "#b3261e"
MARKS, BLANK = {"\n": "\u21b5", "\t": "\u21e5"}, "\u2423"


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from None


def figure_of(width: float, height: float):
    """A Figure, and axes over all of it that are measured in inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def write(axes, x: float, y: float, text: str, size: float = 9, **how) -> None:
    """Text as it is: a `$` begins no formula, and what the font lacks is escaped."""
    how = dict(ha="center", va="center", color=INK) | how
    axes.text(x, y, printable(text), fontsize=size, fontfamily=MONO, parse_math=False, **how)


def printable(text: str) -> str:
    def shown(char: str) -> str:
        return MARKS.get(char) or (char if has_glyph(char) else char.encode("unicode_escape").decode())

    return "".join(map(shown, text))


@functools.cache
def has_glyph(char: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return char.isprintable() and get_font(findfont(MONO)).get_char_index(ord(char)) > 0


def shortened(text: str, length: int) -> str:
    """At most so long, what is missing is missing from the middle."""
    head = length // 2
    return text if len(text) <= length else f"{text[:head]}\u2026{text[head + 1 - length :]}"


def shortened_number(text: str, length: int) -> str:
    """As shortened; of a fraction both sides, and of a decimal the last places are missing."""
    above, bar, below = text.partition("/")
    if len(text) > length and bar:
        half = (length - 1) // 2
        return f"{shortened(above, half)}/{shortened(below, half)}"
    if len(text) > length and 0 < text.find(".") < length - 2:
        return f"{text[: length - 1]}\u2026"
    return shortened(text, length)


# ----------------------------------------------------------------------------------------------------
# The graph behind a number


def draw_dag(thoughts: Sequence[Thought], texts: Sequence[str]):
    """A panel a number: the inputs, the steps computed from them, the result. Choices that were rejected are
    faint, where they had NOTABLE odds. `texts` are those of the tokens that the thoughts are about, from 0.
    """
    assert thoughts, "no thoughts, no picture"
    layouts = [layout(thought) for thought in thoughts]
    columns = [1 + max(column for column, _ in places.values()) for places in layouts]
    heights = [TITLE + FOOT + ROW * (1 + max(row for _, row in places.values())) for places in layouts]
    width = max(6.0, MARGIN * 2 + BOX[0] + COLUMN * max(columns))
    figure, axes = figure_of(width, MARGIN + sum(heights))
    top = 0.0
    for n, (thought, places, height) in enumerate(zip(thoughts, layouts, heights)):
        if n > 0:
            axes.axhline(top + MARGIN / 2, color="#dddddd", linewidth=0.8)
        draw_panel(axes, top + MARGIN, width, height, thought, places, texts)
        top += height
    return figure


def layout(thought: Thought) -> dict[int, tuple[int, float]]:
    """Column and row of every slot that is shown: inputs stand as in the text, a step behind its operands."""
    shown = {thought.result}.union(*(considered(step) for step in thought.steps))
    inputs = [number.slot for number in reversed(thought.inputs) if number.slot in shown]
    places = {slot: (0, float(row)) for row, slot in enumerate(inputs)}
    for step in thought.steps:
        column = 1 + max(places[slot][0] for slot in step.operands)
        row = sum(places[slot][1] for slot in step.operands) / len(step.operands)
        while any(c == column and abs(r - row) < 1 for c, r in places.values()):
            row += 0.5
        places[step.slot] = column, row
    return places


def considered(step: Step) -> set[int]:
    """The slots of its operands, and of those that were rejected."""
    return set(step.operands).union(*map(rejected, step.operand_probability, step.operands))


def rejected(odds: dict, chosen) -> list:
    """What else was likely, in order; at most MOST."""
    order = sorted(odds, key=odds.get, reverse=True)
    return [choice for choice in order if choice != chosen and odds[choice] >= NOTABLE][:MOST]


def draw_panel(axes, top, width, height, thought: Thought, places, texts) -> None:
    middles = {
        slot: (MARGIN + BOX[0] / 2 + column * COLUMN, top + TITLE + BOX[1] / 2 + row * ROW)
        for slot, (column, row) in places.items()
    }
    draw_title(axes, top, width, thought, texts)
    for step in thought.steps:
        draw_operands(axes, middles, step)
    for number in thought.inputs:
        if number.slot in middles:
            draw_box(axes, middles[number.slot], INPUT, number.value, below=surroundings(number, texts))
    for step in thought.steps:
        odds = step.operation_probability
        above = f"{step.operation} {percent(odds[step.operation])}" if odds else step.operation
        below = ", ".join(f"{name} {percent(odds[name])}" for name in rejected(odds, step.operation))
        draw_box(axes, middles[step.slot], STEP, step.value or "no value", above, below and f"or {below}")
    x, y = middles[thought.result]
    end = width - MARGIN - BOX[0] / 2, y
    draw_edge(axes, (x, y), end, INK)
    below = f"gate {percent(thought.gate)}, plan {percent(thought.probability)}"
    draw_box(axes, end, RESULT, thought.written or "nothing", thought.format, below, bold=True)
    if not thought.followed:
        text = f"the text: {shortened_number(thought.text, 14)}"
        write(axes, end[0], y - BOX[1] / 2 - 0.1, text, SMALL, color=WRONG)
    if thought.alternatives:
        other = thought.alternatives[0]
        text = shortened(f"next best: {other.expression}", letters(width, SMALL) - 12)
        odds = f", {percent(other.probability)}"
        write(axes, MARGIN, top + height - MARGIN - 0.05, text + odds, SMALL, ha="left", color=FAINT)


def draw_title(axes, top: float, width: float, thought: Thought, texts) -> None:
    """The end of the text, the number in bold."""
    size = 11
    before = "".join(texts[: thought.first]).rpartition("\n")[2]
    number = shortened_number(thought.text, 40)
    room = letters(width, size) - len(number)
    before = before if len(before) <= room else "\u2026" + before[1 - room :]
    write(axes, MARGIN, top + 0.12, before, size, ha="left", color="#555555")
    x = MARGIN + len(printable(before)) * size * LETTER
    write(axes, x, top + 0.12, number, size, ha="left", weight="bold")


def letters(width: float, size: float) -> int:
    """How many fit."""
    return int((width - 2 * MARGIN) / (size * LETTER))


def surroundings(number: Number, texts: Sequence[str], reach: int = 5) -> str:
    """An input where it stands in the text."""
    before, after = "".join(texts[: number.first]), "".join(texts[number.last + 1 :])
    own = "".join(texts[number.first : number.last + 1])
    return f"{before[-reach:]}\u2039{shortened_number(own, 9)}\u203a{after[:reach]}"


def draw_operands(axes, middles, step: Step) -> None:
    x, y = middles[step.slot]
    for n, slot in enumerate(step.operands):
        odds = step.operand_probability[n] if step.operand_probability else {}
        end = x, y + (0.0 if len(step.operands) == 1 else (n - 0.5) * BOX[1] / 2)
        for other in rejected(odds, slot):
            draw_edge(axes, middles[other], end, FAINT, percent(odds[other]), dashed=True)
        draw_edge(axes, middles[slot], end, INK, percent(odds[slot]) if odds else "")


def draw_edge(axes, begin, end, color: str, label: str = "", dashed: bool = False) -> None:
    """From the middle of one box to the left side of another."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    (x, y), (to_x, to_y) = (begin[0] + BOX[0] / 2, begin[1]), (end[0] - BOX[0] / 2, end[1])
    bend = (to_x - x) / 2
    path = Path([(x, y), (x + bend, y), (to_x - bend, to_y), (to_x, to_y)], [1, 4, 4, 4])
    style = dict(arrowstyle="-|>,head_length=3,head_width=1.5", color=color)
    axes.add_patch(FancyArrowPatch(path=path, lw=0.8, ls="--" if dashed else "-", zorder=1, **style))
    if label:
        at = 0.3 if dashed else 0.7  # of the way: labels of edges that meet in one box stand apart
        near, far = (1 - at) ** 2 * (1 + 2 * at), at**2 * (3 - 2 * at)  # of the curve
        where = x * (1 - at) ** 3 + 3 * (x + bend) * at * (1 - at) + to_x * at**3, near * y + far * to_y
        write(
            axes, *where, label, SMALL - 1, color=color, zorder=1.5, bbox=dict(fc="white", ec="none", pad=0.5)
        )


def draw_box(axes, middle, color: str, value: str, above="", below="", bold: bool = False) -> None:
    from matplotlib.patches import FancyBboxPatch

    (x, y), (width, height) = middle, BOX
    corner = x - width / 2, y - height / 2
    style = dict(boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec=INK, lw=0.8)
    axes.add_patch(FancyBboxPatch(corner, width, height, zorder=2, **style))
    weight = "bold" if bold else "normal"
    write(axes, x, y + 0.08 * bool(above), shortened_number(value, 14), 10, weight=weight)
    write(axes, x, y - 0.13, above, SMALL, color="#555555")
    write(axes, x, y + height / 2 + 0.04, below, SMALL, color=FAINT, va="top")


def percent(p: float) -> str:
    return "<0.1%" if 0 < p < 0.0005 else f"{p:.1%}".replace(".0%", "%")


# ----------------------------------------------------------------------------------------------------
# The odds of every token

CELL = (0.98, 0.25)  # width and height
DARK, FRAME = (0.12, 0.35, 0.62), "#d1560f"


def draw_heatmap(choices: Sequence[Choice], first: int = 1):
    """A row a token: what was likeliest in its place, in order, dark where it was likely; what was written is
    framed. The last column has what was written and was not among the LIKELIEST. Rows count from `first` on.
    """
    assert choices, "no choices, no picture"
    rows = [cells_of(choice) for choice in choices]
    columns = 1 + max(max(cells) for cells, _ in rows)
    left, top = 1.1, 0.75
    figure, axes = figure_of(left + columns * CELL[0] + MARGIN, top + len(rows) * CELL[1] + MARGIN)
    write(
        axes,
        MARGIN,
        0.22,
        "What the model chose from, at temperature 1; what it wrote is framed",
        10,
        ha="left",
    )
    for column in range(columns):
        head = f"{column + 1}." if column < LIKELIEST else "beyond"
        write(axes, left + (column + 0.5) * CELL[0], top - 0.12, head, SMALL, color=FAINT)
    for row, (choice, (cells, written)) in enumerate(zip(choices, rows)):
        y = top + row * CELL[1]
        write(axes, left - 0.5, y + CELL[1] / 2, str(first + row), SMALL, ha="right", color=FAINT)
        write(axes, left - 0.1, y + CELL[1] / 2, token_text(choice.text, 8), 9, ha="right", weight="bold")
        for column, (text, p) in cells.items():
            draw_cell(axes, left + column * CELL[0], y, text, p, framed=column == written)
    return figure


def cells_of(choice: Choice) -> tuple[dict[int, tuple[str, float]], int]:
    """Column: text and probability; and the column of what was written."""
    cells = dict(enumerate(choice.likeliest))
    own = choice.text, choice.probability
    written = next((column for column, cell in cells.items() if cell == own), LIKELIEST)
    return cells | {written: own}, written


def draw_cell(axes, x: float, y: float, text: str, p: float, framed: bool) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), *CELL, fc=(*DARK, p), ec="white", lw=0.5, zorder=1))
    if framed:
        axes.add_patch(Rectangle((x, y), *CELL, fc="none", ec=FRAME, lw=1.6, zorder=3))
    color, middle = "white" if p > 0.6 else INK, y + CELL[1] / 2
    write(axes, x + 0.06, middle, token_text(text, 6), 9, ha="left", color=color)
    write(axes, x + CELL[0] - 0.05, middle, percent(p), SMALL - 1, ha="right", color=color)


def token_text(text: str, length: int) -> str:
    """A token with its blanks to be seen."""
    return shortened(printable(text).replace(" ", BLANK), length)
