"""Prints the table of what the benchmark has measured."""

from tests import peer_parts


def show(results: dict[str, dict[str, float]]) -> None:
    """Print the table: ratios to the bare pipe, of peers to the drain, and to the other side."""
    this, *others = results.values()
    other = others[0] if others else {}
    print(f"{'measured':<52} {'value':>10} {'of the pipe':>12}{'of the drain':>13}", end="")
    print(f"{'against':>13}{'ratio':>9}" if others else "")
    for name, value in this.items():
        per_second = name.endswith("/s") or "/s " in name or "/s," in name
        line = f"{name:<52} {value:10.1f} "
        line += ratio(value, this.get("pipe/s") if per_second else None, 12)
        line += ratio(value, this.get("drain/s") if peer_parts.name_of(name) else None, 13)
        if name in other:
            line += f"{other[name]:13.1f}" + ratio(value, other[name], 9)
        print(line.rstrip())
    if "FastAPI create/s" in this:
        print(f"create of FastAPI's: {this['create/s'] / this['FastAPI create/s']:.2f}")


def ratio(value: float, other: float | None, width: int) -> str:
    """Return a cell of the table, an empty one without the other value."""
    return f"{value / other:{width}.2f}" if other else " " * width
