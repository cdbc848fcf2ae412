"""The chart shows what was measured, and nothing of it is lost on a reader without eyes."""

import xml.etree.ElementTree as ET

import pytest

from tests import chart, peer_parts

pytestmark = pytest.mark.pure

RESULTS = {
    "pipe/s": 20_000.0,
    "pipe/s, blocking": 9000.0,
    "drain/s": 10_000.0,
    "Celery 1.2.3, 9000 tasks, tasks/s": 996.0,
    "Celery 1.2.3 p50 ms": 12.0,
    "PgQueuer 1.2.3, batches of 100, 30000 tasks, tasks/s": 12_019.0,
}
SVG = "{http://www.w3.org/2000/svg}"


def test_the_chart_has_a_bar_as_long_as_its_figure_for_each_that_was_measured():
    svg = ET.fromstring(chart.draw(RESULTS))
    lengths = [int(bar.get("width")) for bar in svg.iter(f"{SVG}rect")][1:]
    assert lengths == [chart.LONGEST * part // 40 for part in (40, 24, 20, 2)]
    texts = [text.text for text in svg.iter(f"{SVG}text")][2:]
    assert texts[0::2] == [
        "bare pipe, no database",
        "PgQueuer 1.2.3, batches of 100",
        "this service",
        "Celery 1.2.3",
    ]
    assert texts[1::2] == [
        "20,000",
        "12,000 · 0.60 of the pipe",
        "10,000 · 0.50 of the pipe",
        "1,000 · 0.05 of the pipe",
    ]


def test_the_longest_bar_has_room_also_if_a_peer_is_faster_than_the_pipe():
    svg = ET.fromstring(chart.draw(RESULTS | {"pipe/s": 6_009.5}))
    lengths = [int(bar.get("width")) for bar in svg.iter(f"{SVG}rect")][1:]
    assert lengths[:2] == [chart.LONGEST // 2, chart.LONGEST]


def test_the_chart_says_its_figures_aloud_and_stays_small():
    drawn = chart.draw(RESULTS)
    described = ET.fromstring(drawn).find(f"{SVG}desc").text
    assert "this service: 10,000" in described and "Celery 1.2.3: 1,000" in described
    assert len(drawn.encode()) < 6000


@pytest.mark.parametrize("missing", ["pipe/s", "drain/s", "peers"])
def test_no_chart_is_drawn_of_a_part(missing):
    rest = {name: value for name, value in RESULTS.items() if name != missing}
    if missing == "peers":
        rest = {name: value for name, value in rest.items() if "tasks/s" not in name}
    with pytest.raises(KeyError, match=missing):
        chart.draw(rest)


def test_each_peer_is_installed_in_the_version_that_the_table_names():
    for peer in peer_parts.PEERS:
        version = peer_parts.versions()[peer.package]
        assert peer_parts.label(peer).startswith(f"{peer.name.partition(',')[0]} {version}")
        assert peer_parts.name_of(f"{peer_parts.label(peer)}, 9 tasks, tasks/s") == (
            peer_parts.label(peer)
        )
