"""Draws benchmark.svg of .run/benchmark.json: tasks/s of the bare pipe, the service and its peers.

Run it with `python -m tests.chart`, after `bench --peers`, which does so too."""

import json
import pathlib
import sys
import xml.etree.ElementTree as ET

from native import servers
from tests import peer_parts

RESULTS = servers.HERE / ".run" / "benchmark.json"
CHART = servers.HERE / "benchmark.svg"
WIDTH, ROW, BAR = 760, 30, 18
TOP, BOTTOM = 66, 18
LEFT, LONGEST = 226, 360  # where bars begin, and how long the longest is
SUBTITLE = "a durable row a task; all on 2 cores in one run; PgQueuer and Procrastinate: no broker"
# On a ground of its own: a picture cannot know what the page around it is like.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.ground { fill: #fff } .muted { fill: #59636e }
.head { font-size: 15px; font-weight: 600 } .ours { font-weight: 600 }
.bar { fill: #8c959f } .bar.ours { fill: #0969da } .bar.pipe { fill: #d1d9e0 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .ground { fill: #0d1117 } .muted { fill: #9198a1 }
.bar { fill: #656c76 } .bar.ours { fill: #4493f8 } .bar.pipe { fill: #3d444d }
}
"""


def bars(results: dict[str, float]) -> list[tuple[str, str, float]]:
    """Return label, class and tasks/s of each bar: the pipe, then the fastest first.

    KeyError if pipe, drain or peers were not measured."""
    named = {key: peer_parts.name_of(key) for key in results}
    peers = [(name, "peer", results[key]) for key, name in named.items() if name]
    if not peers:
        raise KeyError("peers")
    pipe = ("bare pipe, no database", "pipe", results["pipe/s"])
    rest = [("this service", "ours", results["drain/s"]), *peers]
    return [pipe, *sorted(rest, key=lambda bar: -bar[2])]


def draw(results: dict[str, float]) -> str:
    """Return the chart of one side's results as SVG."""
    rows = bars(results)
    pipe = rows[0][2]
    most = max(value for _, _, value in rows)
    height = TOP + ROW * len(rows) + BOTTOM
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "role": "img",
            "aria-labelledby": "title desc",
        },
    )
    title = "Tasks per second, drained by two workers"
    ET.SubElement(svg, "title", id="title").text = title
    spoken = "; ".join(f"{name}: {rounded(value)}" for name, _, value in rows)
    ET.SubElement(svg, "desc", id="desc").text = f"{spoken}."
    ET.SubElement(svg, "style").text = STYLE
    ground = {"width": str(WIDTH), "height": str(height), "rx": "8", "class": "ground"}
    ET.SubElement(svg, "rect", ground)
    write(svg, 20, 28, title, "head")
    write(svg, 20, 48, SUBTITLE, "muted")
    for number, (name, kind, value) in enumerate(rows):
        top = TOP + ROW * number
        length = max(1, round(LONGEST * value / most))
        write(svg, LEFT - 10, top + 14, name, kind, "end")
        bar = {"x": str(LEFT), "y": str(top), "width": str(length), "height": str(BAR)}
        ET.SubElement(svg, "rect", bar | {"rx": "3", "class": f"bar {kind}"})
        figure = rounded(value) + (f" · {value / pipe:.2f} of the pipe" if number else "")
        write(svg, LEFT + length + 8, top + 14, figure, kind if kind == "ours" else "muted")
    ET.indent(svg, "")
    return ET.tostring(svg, "unicode") + "\n"


def rounded(value: float) -> str:
    """Return a figure with no more digits than two runs have in common."""
    return f"{round(value, -2 if value >= 1000 else -1):,.0f}"


def write(svg: ET.Element, x: int, y: int, text: str, kind: str, anchor: str = "start") -> None:
    """Add a line of text."""
    place = {"x": str(x), "y": str(y), "text-anchor": anchor, "class": kind}
    ET.SubElement(svg, "text", place).text = text


def main(path: pathlib.Path = CHART) -> None:
    """Draw what the last benchmark has measured."""
    try:
        results = json.loads(RESULTS.read_text())["results"]["this"]
        path.write_text(draw(results))
    except (OSError, KeyError) as error:
        sys.exit(f"{RESULTS} lacks {error}: expected that of bench --peers --only pipe,drain")


if __name__ == "__main__":
    main()
