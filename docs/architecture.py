"""Draw docs/architecture.svg, the parts of the project and what imports what, from the code itself.

    python3 docs/architecture.py          # write the picture
    python3 docs/architecture.py --check  # exit with status 1 if the picture is not the one that the code gives

A part is a file or a package at the root that stands in LAYERS of tests/test_layers.py, which also gives its row. An
arrow is an import; one that follows from others (A imports B, B imports C) is left out. The text of a box is the first
line of the part's docstring.
"""

import argparse
import ast
import html
import itertools
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "architecture.svg"

WIDTH = 900  # pixels, as are all lengths
BOX, HEIGHT, STEP = 262, 76, 128  # width and height of a box, distance of the rows
GAP, PORT = 24, 30  # between neighbors in a row, between the starts of a box's arrows
LANE = 24  # width that an arrow takes where it passes through a row
CHARACTERS, LINES = 40, 2  # of the text of a box
SWEEPS = 10  # in turns down and up

STYLE = """
  text { font-family: -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; text-anchor: middle; }
  .name { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 15px; }
  .name { font-weight: 600; fill: #1f2328; }
  .line { font-size: 12.5px; fill: #444c56; }
  .file { fill: #ddf4ff; stroke: #218bff; }
  .package { fill: #f6f8fa; stroke: #8c959f; }
  .arrow { fill: none; stroke: #8c959f; stroke-width: 1.6; }
  .head { fill: #8c959f; }
"""

# ---------------------------------------------------------------------------
# What the code says


def read_layers():
    """Return LAYERS of tests/test_layers.py, lowest first, without importing it (and with it, PyTorch)."""
    for node in parse(ROOT / "tests" / "test_layers.py").body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "LAYERS":
            return ast.literal_eval(node.value)
    raise ValueError("tests/test_layers.py has no LAYERS")


def parse(path):
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def sources(part):
    """Return the Python files of a part; the first has its docstring."""
    file, folder = ROOT / f"{part}.py", ROOT / part
    return [file] if file.exists() else [folder / "__init__.py", *sorted(folder.rglob("*.py"))]


def imports(part):
    """Return the first names of all modules that a part imports, anywhere in its files."""
    names = set()
    for node in itertools.chain.from_iterable(ast.walk(parse(path)) for path in sources(part)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def reduced(edges):
    """Return {part: parts that it imports} of an acyclic graph without the edges that follow from others."""

    def reachable(part):
        return edges[part].union(*(reachable(below) for below in edges[part]))

    return {part: below - set().union(*(reachable(other) for other in below)) for part, below in edges.items()}


def summary(part):
    """Return the first line of a part's docstring as lines of a box, without the clauses that do not fit."""
    first = (ast.get_docstring(parse(sources(part)[0])) or "").split("\n")[0]
    first = re.sub(r" ?\([^)]*\)", "", first).replace("`", "").split(". ")[0].rstrip(".")
    for separator in (r"[:;] ", ", "):
        clauses = re.split(f"(?={separator})", first)
        while len(clauses) > 1 and len(textwrap.wrap("".join(clauses), CHARACTERS)) > LINES:
            clauses.pop()
        first = "".join(clauses)
    lines = textwrap.wrap(first, CHARACTERS, max_lines=LINES, placeholder=" …")
    even = len(first) // max(1, len(lines)) + 4  # characters of lines of about equal length
    return lines if len(lines) < 2 else min(textwrap.wrap(first, even), lines, key=len)


# ---------------------------------------------------------------------------
# Where things go


def place(rows, edges):
    """Return {(node, row): center}, and the arrows as lists of such nodes.

    A node is a part, in its own row, or, in the rows between, the lane of all arrows to a part: they join there.

    Args:
      rows: [[part]], top first; edges: {part: parts below it}.
    """
    level = {part: number for number, row in enumerate(rows) for part in row}
    arrows = [
        [(part, level[part]), *((below, number) for number in range(level[part] + 1, level[below] + 1))]
        for part in level
        for below in sorted(edges[part])
    ]
    links = sorted({pair for arrow in arrows for pair in itertools.pairwise(arrow)})
    nodes = {(part, level[part]) for part in level}.union(*arrows)
    order = [sorted(node for node in nodes if node[1] == number) for number in range(len(rows))]
    around = {node: ([a for a, b in links if b == node], [b for a, b in links if a == node]) for node in nodes}
    size = {node: BOX if level[node[0]] == node[1] else LANE for node in nodes}
    center = dict.fromkeys(nodes, WIDTH / 2)
    best = None
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in order if down else reversed(order):
            near = {node: around[node][0 if down else 1] or around[node][1 if down else 0] for node in row}
            row.sort(key=lambda node: sum(center[other] for other in near[node]) / max(1, len(near[node])))
            spread(row, near, size, center)
        crossings = sum(crossed(a, b, center) for a, b in itertools.combinations(links, 2))
        length = sum(abs(center[a] - center[b]) for a, b in links)
        if best is None or (crossings, length) < best[0]:
            best = (crossings, length), [list(row) for row in order]
    order = best[1]
    pull = {node: [] for node in nodes}  # lanes count more than once: a long arrow shall be straight
    for a, b in links:
        times = (1, 2, 8)[(size[a] == LANE) + (size[b] == LANE)]
        pull[a] += [b] * times
        pull[b] += [a] * times
    for _ in range(10 * SWEEPS):
        for row in order:
            spread(row, pull, size, center)
    return center, arrows


def spread(row, near, size, center):
    """Move the nodes of a row towards the middle of those that they are near to, in their order and without overlap."""
    wanted = [sum(center[other] for other in near[node]) / len(near[node]) for node in row]
    offset = [0.0]
    for left, right in itertools.pairwise(row):
        offset.append(offset[-1] + (size[left] + size[right]) / 2 + GAP)
    blocks = []  # [sum of wanted positions of the first node, number of nodes]: neighbors that touch move as one
    for want, shift in zip(wanted, offset, strict=True):
        blocks.append([want - shift, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, number = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + number]
    starts = [total / number for total, number in blocks for _ in range(number)]
    low, high = size[row[0]] / 2 + 2, WIDTH - size[row[-1]] / 2 - 2 - offset[-1]
    for node, start, shift in zip(row, starts, offset, strict=True):
        center[node] = min(max(start, low), high) + shift


def crossed(one, two, center):
    """True if two links between the same rows cross."""
    (a, b), (c, d) = one, two
    return a[1] == c[1] and (center[a] - center[c]) * (center[b] - center[d]) < 0


# ---------------------------------------------------------------------------
# The picture


def draw(layers):
    """Return the text of the SVG file."""
    rows = [sorted(layer) for layer in reversed(layers)]
    parts = set().union(*layers)
    edges = reduced({part: (imports(part) & parts) - {part} for part in parts})
    center, arrows = place(rows, edges)
    height = (len(rows) - 1) * STEP + HEIGHT + 4
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' role="img" aria-label="The parts of the project; arrows point to what a part imports">',
        f"<style>{STYLE}</style>",
    ]
    links = {pair for arrow in arrows for pair in itertools.pairwise(arrow)}
    out += sorted({path(*link, start_of(link, links, rows, center), rows, center) for link in links})
    for part, row in sorted({arrow[-1] for arrow in arrows}):
        x, y = center[part, row], row * STEP + 2
        out.append(f'<path class="head" d="M{x:.1f} {y}l-5.5 -9h11z"/>')
    for row, names in enumerate(rows):
        out += [line for part in names for line in box(part, center[part, row], row * STEP + 2)]
    return "\n".join([*out, "</svg>"]) + "\n"


def start_of(link, links, rows, center):
    """Return where a link starts: those of a box side by side, in the order of where they lead."""
    start, end = link
    ends = sorted((b for a, b in links if a == start), key=center.get)
    return center[start] + (ends.index(end) - (len(ends) - 1) / 2) * (PORT if start[0] in rows[start[1]] else 0)


def path(start, end, x, rows, center):
    """Return the curve of a link from x in one row to the next; through a row that it only passes it goes straight."""
    y = start[1] * STEP + 2 + HEIGHT
    top = y if start[0] in rows[start[1]] else y - HEIGHT
    to, bottom = center[end], end[1] * STEP + 2 - (8 if end[0] in rows[end[1]] else 0)
    bend = (bottom - y) * 0.55
    curve = f"C{x:.1f} {y + bend:.1f} {to:.1f} {bottom - bend:.1f} {to:.1f} {bottom}"
    return f'<path class="arrow" d="M{x:.1f} {top}V{y}{curve}"/>'


def box(part, x, y):
    """Return the elements of a part's box, whose top is at y and middle at x."""
    kind, name = ("file", f"{part}.py") if (ROOT / f"{part}.py").exists() else ("package", f"{part}/")
    yield f'<rect class="{kind}" x="{x - BOX / 2:.1f}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="8"/>'
    yield f'<text class="name" x="{x:.1f}" y="{y + 24}">{name}</text>'
    lines = summary(part)
    for number, line in enumerate(lines):
        top = y + (45 if len(lines) > 1 else 50) + 17 * number
        yield f'<text class="line" x="{x:.1f}" y="{top}">{html.escape(line)}</text>'


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args(argv)
    text = draw(read_layers())
    if not args.check:
        OUT.write_text(text, encoding="utf-8")
    elif not OUT.exists() or OUT.read_text(encoding="utf-8") != text:
        print("docs/architecture.svg is out of date: run python3 docs/architecture.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
