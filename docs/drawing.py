"""Draws pictures/sharing.svg: python -m docs.drawing, from the root of the repository."""

from pathlib import Path

BLOCKS = 3
LEFT, STEP, WIDTH = 40, 200, 120
PAPER, INK, QUIET, UNIT, STATE = "#ffffff", "#1f2328", "#8c959f", "#8250df", "#ffd8b5"


def main() -> None:
    """Write the picture next to the others."""
    parts = [*_row(0, "one unit per block", shared=False), *_row(250, "one unit per stage: DIA", shared=True)]
    style = f"text{{font:14px sans-serif;fill:{INK}}} .small{{font-size:12px}} .title{{font-weight:bold}}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 500" role="img" aria-label="' + (
        'Above, every block has a unit of its own. Below, one unit serves all blocks and hands its state on.">'
    )
    marks = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
        for name, colour in {"ink": INK, "state": STATE, "unit": UNIT}.items()
    )
    paper = f'<rect width="680" height="500" rx="8" fill="{PAPER}"/>'
    text = "\n".join([head, f"<style>{style}</style>", f"<defs>{marks}</defs>", paper, *parts, "</svg>\n"])
    (Path(__file__).parent / "pictures" / "sharing.svg").write_text(text)


def _row(top: int, title: str, *, shared: bool) -> list[str]:
    """Return the blocks of a stage, with the stream below and the units above."""
    parts = [_text(LEFT, top + 30, title, "title", "start")]
    if shared:
        parts += [_box(LEFT, top + 48, STEP * (BLOCKS - 1) + WIDTH, 32, UNIT), _text(300, top + 69, "unit", "light")]
    for block in range(BLOCKS):
        x = LEFT + STEP * block
        middle, end = x + WIDTH / 2, x + WIDTH + 16
        if not shared:
            parts += [_box(x, top + 48, WIDTH, 32, UNIT), _text(middle, top + 69, f"unit {block + 1}", "light")]
        parts += [
            _box(x, top + 120, WIDTH, 36, PAPER),
            _text(middle, top + 143, f"branch {block + 1}"),
            _line(middle - 24, top + 120, middle - 24, top + 82, INK),
            _text(middle - 30, top + 105, "features", "small", "end"),
            _line(middle + 24, top + 80, middle + 24, top + 118, UNIT),
            _text(middle + 32, top + 105, "map", "small", "start"),
            _line(x - 16, top + 200, x - 16, top + 138, INK, to=(x - 2, top + 138)),
            _line(x + WIDTH, top + 138, end, top + 138, INK, to=(end, top + 190)),
            _line(x - (55 if block else 34), top + 200, end - 10, top + 200, QUIET),
            f'<circle cx="{end}" cy="{top + 200}" r="9" fill="{PAPER}" stroke="{INK}"/>',
            _text(end, top + 205, "+"),
        ]
        if shared and block < BLOCKS - 1:
            parts += [
                _line(end - 4, top + 69, x + STEP - 4, top + 69, STATE),
                _text(end + 24, top + 60, "state", "small light"),
            ]
    parts.append(_line(LEFT + STEP * (BLOCKS - 1) + WIDTH + 26, top + 200, 660, top + 200, QUIET))
    parts.append(_text(LEFT, top + 226, "the stream", "small", "start"))
    return parts


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{INK}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    colour = f' style="fill:{PAPER}"' if "light" in kind else ""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}"{colour}>{text}</text>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, to: tuple[float, float] | None = None) -> str:
    """Return an arrow, with a corner if there is a second end."""
    mark = {UNIT: "unit", STATE: "state"}.get(colour, "ink")
    corner = f" {to[0]} {to[1]}" if to else ""
    path = f'd="M{x} {y} {to_x} {to_y}{corner}" fill="none" stroke="{colour}" stroke-width="1.6"'
    return f'<path {path} marker-end="url(#{mark})"/>'


if __name__ == "__main__":
    main()
