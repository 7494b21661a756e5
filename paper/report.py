"""
A page for a run, report.html: one file that needs no network, drawn from result.json, log.jsonl and
gates.jsonl. Every run writes its own, and --seeds one for all of them. To make it again:

    python -m paper.report runs/demo-salora                      # RUN/report.html
    python -m paper.report runs/seeds                            # the page over seed0, seed1 ..
    python -m paper.report runs/salora runs/lora --out both.html # runs beside each other
    python -m paper.report runs/demo-salora --svg gates.svg      # the gates closing, as a picture

The style and the script of the page are in report.html beside this file.
"""

import itertools
import json
import math
import os
import re
import statistics
from html import escape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

from data import InputError, read_text
from model import LETTERS
from salora import window_steps
from training.device import RANK
from training.flags import in_words, need, new_parser
from training.runs import read_result, run_command, write_text

TEMPLATE = Path(__file__).with_name("report.html")
ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 340, 200  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 40, 322, 8, 166  # where its axes are
POINTS = 200  # of a curve, at most


# -------------------------------------------------------------------------------------------------
# the files of a run


def read_lines(file, *names):
    """The objects of a JSONL file, each with these entries; [] where there is no such file."""
    entries = []
    for number, line in enumerate(read_text(file).splitlines() if file.exists() else [], 1):
        try:
            entry = json.loads(line)
            entries.append({name: entry[name] for name in names} | entry)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}: line {number} is damaged, expected a JSON object with "
                             f"{', '.join(names)}") from None
    return entries


def read_run(folder):
    """The files of a run. gates: the lines of gates.jsonl, none for a method without gates."""
    folder = Path(folder)
    result = read_result(folder)
    if result is None:
        raise InputError(f"{folder}: has no result.json, expected the folder of a finished run")
    needed = ("history metrics ranks steps kept_density command task method metric seed budget "
              "trainable_params kept_params head_params seconds")
    missing = {*needed.split()} - result.keys() | {"r", "window"} - result["settings"].keys()
    if missing:
        raise InputError(f"{folder / 'result.json'}: has no {', '.join(sorted(missing))}, so "
                         "another version wrote it: run it again")
    log = read_lines(folder / "log.jsonl", "step", "task_loss", "density", "lambda", "orth_a",
                     "orth_b")
    gates = read_lines(folder / "gates.jsonl", "step", "density", "open")
    for number, line in enumerate(gates, 1):
        for table in (line["open"], line.get("kept", line["open"])):
            if [len(row) for row in table] != [len(gates[0]["open"][0])] * len(result["ranks"]):
                raise InputError(f"{folder / 'gates.jsonl'}: line {number} is not of the "
                                 f"{len(result['ranks'])} matrices in result.json")
    return SimpleNamespace(folder=folder, result=result, log=log, gates=gates, name="")


def readable(value):
    """A setting or a number as text; a path in the project's folder is relative to it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.5g}"
    return in_words(value).removeprefix(f"{ROOT}/")


def words(name):
    return name.replace("_", " ")


def name_runs(runs):
    """Names each run by the settings that tell it from the others, or by its folder."""
    settings = [dict(task=run.result["task"]) | run.result["settings"] for run in runs]
    names = [""] * len(runs)
    for key in dict.fromkeys(["task", "method", "budget", "r", "lr", "seed", *settings[0]]):
        title = "" if key in ("task", "method") else words(key)
        longer = [f"{name} {title} {readable(own.get(key))}" for name, own in zip(names, settings)]
        if key != "ranks" and len(set(longer)) > len(set(names)):
            names = longer
    for run, name in zip(runs, names):
        run.name = " ".join(name.split()) if len(set(names)) == len(runs) else str(run.folder)


def window_of(result):
    """(first step, last step) of the window of a method that has one, else None."""
    steps, settings = result["steps"], result["settings"]
    windowed = result["budget"] is not None or settings["method"] == "salora"
    return window_steps(settings["window"], steps) if windowed and steps > 1 else None


# -------------------------------------------------------------------------------------------------
# charts


def ticks(low, high):
    """About four round numbers from at most `low` to at least `high`."""
    if high - low <= 1e-9 * abs(high):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    unit *= next(n for n in (1, 2, 5, 10) if n * unit >= rough * 0.999)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [i * unit for i in range(first, last + 1)]


def chart(data, title, note, lines, unit="step", window=None, low=None, high=None, powers=False):
    """A figure as HTML, "" if there is nothing to draw. lines: {name: [(x, y) ..]}; window: the two
    x to shade between; low, high: what the y axis has to include; powers: a log axis, from 1e-6.
    Adds to `data` what the page's script needs to show values."""
    lines = {name: [(x, y) for x, y in points if y is not None] for name, points in lines.items()}
    lines = {name: points[:-1][::math.ceil(len(points) / POINTS)] + points[-1:]
             for name, points in lines.items() if points}
    if not lines.keys() - {"budget"}:
        return ""

    def level(y):
        return math.log10(max(y, 1e-6)) if powers else y

    xs = [x for points in lines.values() for x, _ in points]
    levels = [level(y) for points in lines.values() for _, y in points]
    levels += [y for y in (low, high) if y is not None]
    left, right = min(xs), max(max(xs), min(xs) + 1)
    marks = ticks(min(levels), max(levels))
    if powers:
        bottom, top = math.floor(min(levels)), math.ceil(max(levels) + 1e-9)
        marks = range(bottom, top + 1, math.ceil((top - bottom) / 5))
    bottom, top = marks[0], max(marks[-1], max(levels))

    def place(x, y):
        return (LEFT + (x - left) / (right - left) * (RIGHT - LEFT),
                BOTTOM - (y - bottom) / (top - bottom) * (BOTTOM - TOP))

    out, keys = [], []
    if window:
        a, b = (place(min(max(x, left), right), bottom)[0] for x in window)
        out.append(f'<rect class="band" x="{a:.1f}" y="{TOP}" width="{b - a:.1f}" '
                   f'height="{BOTTOM - TOP}"/>')
    for mark in marks:
        y, text = place(left, mark)[1], f"1e{mark}" if powers else f"{round(mark, 10):g}"
        out.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{RIGHT}"/><text x="{LEFT - 5}" '
                   f'y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for mark in ticks(left, right):
        if left <= mark <= right:
            out.append(f'<text x="{place(mark, bottom)[0]:.1f}" y="{BOTTOM + 15}" '
                       f'text-anchor="middle">{round(mark, 10):g}</text>')
    out.append(f'<text x="{RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{unit}</text>'
               f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/>')
    for i, (name, points) in enumerate(lines.items()):
        style = f"c{i % 8}" + " dashed" * (name == "budget" or i >= 4)
        at = [place(x, level(y)) for x, y in points]
        curve = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        out.append(f'<path class="curve {style}" d="M{curve}"/>')
        if len(at) <= 25 and name != "budget":
            out += [f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at]
        keys.append(f'<span class="key"><svg viewBox="0 0 20 8" aria-hidden="true"><path '
                    f'class="curve {style}" d="M0 4h20"/></svg>{escape(name)}</span>')
    number = f"chart{len(data)}"
    data[number] = dict(unit=unit, domain=[left, right], range=[LEFT, RIGHT], lines=[
        dict(name=name, x=[x for x, _ in points], y=[float(f"{y:.5g}") for _, y in points])
        for name, points in lines.items()])
    return (f'<figure id="{number}"{" class=windowed" * bool(window)}><h3>{escape(title)}</h3>'
            f'<div>{"".join(keys)}</div><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'role="img" aria-label="{escape(title)}">{"".join(out)}</svg><output></output>'
            f'<figcaption>{escape(note)}</figcaption></figure>\n')


# -------------------------------------------------------------------------------------------------
# maps: a row for each kind of matrix, a column for each layer


class Grid:
    """Where matrices lie in a map: the first number in a path is its layer."""

    def __init__(self, paths, width=620, narrowest=26):
        rows, columns, self.cell = {}, {}, {}
        for path in paths:
            stack, layer, module = re.fullmatch(r"(.*?)(\b\d+\b|$)\.?(.*)", path).groups()
            row = rows.setdefault((stack, module), len(rows))
            self.cell[path] = row, columns.setdefault(layer, len(columns))
        self.columns = list(columns)
        self.rows = [LETTERS.get(module, module) or stack for stack, module in rows]
        self.margin = 14 + max(22 if len(row) == 1 else 7 * len(row) for row in self.rows)
        self.step = max(narrowest, min(56, width // len(self.columns)))  # x of a column

    def name(self, path):
        """As the paper writes it: W^Q of layer 3."""
        row, column = self.cell[path]
        kind, layer = self.rows[row], self.columns[column]
        return ("W^" if len(kind) == 1 else "") + kind + (f" of layer {layer}" if layer else "")

    def draw(self, height, cells):
        """The map as SVG: (width, height, elements). cells: {path: its elements}, with (0, 0) at
        the upper left; height: of a row."""
        out = []
        for row, text in enumerate(map(escape, self.rows)):
            if len(text) == 1:  # W^Q, as the paper has it
                text = f'W<tspan dy="-5" font-size="9">{text}</tspan>'
            out.append(f'<text class="letter" x="2" y="{24 + height * (row + 0.5):g}">{text}'
                       "</text>")
        for column, text in enumerate(self.columns):
            out.append(f'<text x="{self.margin + self.step * (column + 0.5) - 1:g}" y="12" '
                       f'text-anchor="middle">{text}</text>')
        for path, cell in cells.items():
            row, column = self.cell[path]
            out.append(f'<g class="matrix" transform="translate({self.margin + self.step * column} '
                       f'{20 + height * row})">{cell}</g>')
        return (self.margin + self.step * len(self.columns), 20 + height * len(self.rows),
                "".join(out))


def svg(size, name):
    """A map in the page; it scrolls where it is wider than the screen."""
    width, height, elements = size
    return (f'<div class="scroll"><svg class="map" width="{width}" height="{height}" viewBox="0 0 '
            f'{width} {height}" role="img" aria-label="{escape(name)}">{elements}</svg></div>')


def rank_map(values, r, title, note, width=620, unit="rank"):
    """A figure. values: {module path: a number from 0 to r}, by which the cells are colored."""
    grid, cells = Grid(values, width), {}
    for path, value in values.items():
        share, w = min(value / r, 1), grid.step - 2
        inverse = " inverse" * (share > 0.6)
        cells[path] = (
            f'<title>{escape(path)}: {unit} {value} of {r}</title><rect class="level" width="{w}" '
            f'height="24" fill-opacity="{share:.2f}"/><text class="rank{inverse}" x="{w / 2:g}" '
            f'y="17">{value}</text>')
    return (f'<figure><h3>{escape(title)}</h3>{svg(grid.draw(26, cells), title)}<output '
            f'class="hint"></output><figcaption>{escape(note)}</figcaption></figure>\n')


def frames_of(run):
    """The moments of the window, the choice last: step, density, open (K, r)."""
    frames = [dict(step=line["step"] + 1, density=line["density"], open=line["open"], choice=False)
              for line in run.gates]
    if run.gates and "kept" in run.gates[-1]:
        frames.append(frames[-1] | dict(open=run.gates[-1]["kept"], choice=True,
                                        density=run.result["kept_density"]))
    return frames


def gate_map(paths, opened, width=620, narrowest=26):
    """(width, height, SVG elements) of all gates at a moment. opened (K, r): P(g > 0) of each. The
    triplets of a matrix are stacked, the largest singular value on top."""
    grid, r, cells = Grid(paths, width, narrowest), len(opened[0]), {}
    h = max(2, min(6, 48 // r))  # of a gate
    for path, row in zip(paths, opened):
        w = grid.step - 2
        gates = "".join(f'<path d="M1 {1 + h * (j + 0.5):g}h{w - 2}" '
                        f'opacity="{p:.2f}"/>' for j, p in enumerate(row))
        cells[path] = (f'<title>{escape(path)}</title><rect class="box" width="{w}" height="'
                       f'{h * r + 2}"/><g class="gates" stroke-width="{h - (h > 3)}">{gates}</g>')
    return grid.draw(h * r + 5, cells)


def first_to_lose(run):
    """A sentence about the first matrices with a gate below one half."""
    grid, lost = Grid(run.result["ranks"]), {}
    for line in run.gates:
        for path, row in zip(run.result["ranks"], line["open"]):
            if min(row) < 0.5:
                lost.setdefault(path, line["step"] + 1)
    names = [f"{grid.name(path)} (step {lost[path]})" for path in sorted(lost, key=lost.get)]
    if not names:
        return "No gate fell below 0.5."
    return f"The first matrices with a gate below 0.5, where it shuts: {', '.join(names[:5])}."


def player(run):
    """The map of gates with its slider, as HTML, and the data of its moments."""
    frames, paths = frames_of(run), list(run.result["ranks"])
    # two digits a gate, 00 to 99 for 0 to 1
    data = [frame | dict(density=float(f"{frame['density']:.5g}"), open="".join(
        f"{round(99 * p):02d}" for row in frame["open"] for p in row)) for frame in frames]
    order = ", the largest singular value on top" * bool(run.result["settings"].get("turn"))
    html = f"""<h2>The gates</h2>
<p>Every stripe is the gate of a triplet, stacked by matrix{order}. The stronger its color, the
surer it is to be open (eq. 8). Move through the window and see which matrices lose first. At the
end the choice is made: the triplets with a color stay, the rest is cut out.</p>
<figure id="gates">
<div class="player"><button id="play">Play</button>
<input id="slider" type="range" min="0" max="{len(frames) - 1}" value="0" aria-label="moment"></div>
<output id="moment"></output>
{svg(gate_map(paths, frames[0]["open"]), "gates")}<output class="hint"></output>
<figcaption>{escape(first_to_lose(run))}</figcaption></figure>
"""
    return html, dict(frames=data, r=len(frames[0]["open"][0]), paths=paths,
                      steps=run.result["steps"])


SVG_STYLE = """
.paper { fill: #ffffff; } .box { fill: none; stroke: #dcdcdc; } .gates { stroke: #0072b2; }
text { font: 12px system-ui, sans-serif; fill: #5c5c5c; } .letter { fill: #1a1a1a; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #16181b; } .box { stroke: #3a3d41; } .gates { stroke: #56b4e9; }
  text { fill: #a6a6a6; } .letter { fill: #ececec; }
}
"""


def gates_svg(run):
    """The gates closing as one picture: the start of the window, two moments between, the
    choice."""
    frames = frames_of(run)
    if not frames:
        raise InputError(f"{run.folder}: has no gates.jsonl, expected a run of --method salora")
    paths, last, out, right, height = list(run.result["ranks"]), len(frames) - 1, [], 0, 0
    for i in range(4):
        frame = frames[i * last // 3]
        w, h, elements = gate_map(paths, frame["open"], width=140, narrowest=9)
        label = "the choice" if frame["choice"] else f"density {frame['density']:.2f}"
        out.append(f'<g transform="translate({right} 24)">{elements}</g><text class="letter" '
                   f'x="{right + 2}" y="14">step {frame["step"]}: {label}</text>')
        right, height = right + max(w, 160) + 14, 24 + h
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{height}" '
            f'viewBox="0 0 {right} {height}"><style>{SVG_STYLE}</style>'
            f'<rect class="paper" width="{right}" height="{height}"/>{"".join(out)}</svg>\n')


# -------------------------------------------------------------------------------------------------
# the page


def table(head, rows, numbers=()):
    """HTML; numbers: the columns that are set to the right. A cell (text, href) is a link."""
    def cell(tag, column, value):
        kind = ' class="number"' if column in numbers else ""
        if isinstance(value, tuple):
            text = f'<a href="{escape(value[1])}">{escape(value[0])}</a>'
        else:
            text = escape(readable(value))
        return f"<{tag}{kind}>{text}</{tag}>"

    lines = [("th", head), *(("td", row) for row in rows)]
    return '<div class="scroll"><table>' + "\n".join(
        "<tr>" + "".join(cell(tag, i, value) for i, value in enumerate(row)) + "</tr>"
        for tag, row in lines) + "</table></div>\n"


def tiles(values):
    return '<div class="tiles">' + "".join(
        f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in values.items()
    ) + "</div>\n"


PANELS = (  # name in log.jsonl, title, caption, more if there is a window, keywords of chart()
    ("task_loss", "Task loss in training", "The mean since the line before: it falls.", "Where the "
     "learning rate starts again, after the window, it may step up.", dict(low=0)),
    ("density", "Density", "The share of the adapter's parameters that is expected to stay (eq. "
     "11).", "From the start of the window it goes down to the budget.", dict(low=0, high=1)),
    ("lambda", "Lambda", "The multiplier of (density - budget)² (eq. 12).", "It climbs while the "
     "density is off the budget, and stands still outside the window.", dict(low=0)),
    ("orth_a", "Orthogonality of A: |AA' - I|²", "The mean over the matrices (eq. 9), the axis in "
     "powers of ten from a millionth. At 0, the triplets of a matrix look at different inputs.",
     "A turn into singular directions makes it 0.", dict(powers=True)),
    ("orth_b", "Orthogonality of B: |B'B - I|²", "B starts at zero, so this starts at the rank.",
     "A turn makes the columns as long as the singular values.", dict(powers=True)))


def charts_of(runs):
    """The charts as HTML, and their data. One run has all its metrics in a chart; several runs
    share a chart for each metric."""
    data, alone, scores, parts = {}, len(runs) == 1, {}, []
    windows = {window_of(run.result) for run in runs} - {None}
    budgets = {run.result["budget"] for run in runs} - {None}
    steps = max(run.result["steps"] for run in runs)
    window = windows.pop() if len(windows) == 1 else None
    for run in runs:
        result = run.result
        metrics = [name for name in result["history"][0] if name not in ("step", "epoch")]
        for name in metrics if alone else [result["metric"]]:
            # perplexity has another scale than the loss
            group = "score" if alone and name != "perplexity" else name
            points = [(entry["epoch"], entry[name]) for entry in result["history"]]
            scores.setdefault(group, {})[run.name or words(name)] = points
    for name, lines in scores.items():
        title = words(name if len(lines) > 1 or not alone else [*lines][0]).capitalize()
        note = "On rows that are not trained on."
        note += " It may dip where the window closes and triplets are cut out." * bool(window)
        parts.append(chart(data, f"{title} after each epoch", note, lines, unit="epoch"))
    for name, title, note, more, axis in PANELS:
        # step + 1, as the progress line counts
        lines = {run.name or words(name): [(line["step"] + 1, line[name]) for line in run.log]
                 for run in runs}
        if name in ("density", "lambda"):  # without gates it never moves
            lines = {of: line for of, line in lines.items() if len({y for _, y in line}) > 1}
        if name == "density" and len(budgets) == 1:
            lines["budget"] = [(x, *budgets) for x in (1, steps)]
        note += f" {more} The window is shaded." * bool(window)
        parts.append(chart(data, title, note, lines, window=window, **axis))
    return f'<div class="grid">\n{"".join(parts)}</div>\n', data


def answers_of(result):
    """What the model answered to instructions, as HTML."""
    rows = []
    for e in result["answers"]:
        same = "✓ " if e["after"] == e["reference"] else ""
        cells = [f"{e['instruction']}\n{e['input']}".strip(), e["reference"], e["before"],
                 same + e["after"]]
        rows.append([text if len(text) <= 500 else text[:500] + " …" for text in cells])
    return ("<h2>Answers</h2>\n<p>To the first held-out instructions, in the order of the file, "
            "before training (of the model as it came) and after. ✓: equal to the reference."
            "</p>\n"
            + table(["instruction", "reference", "before", "after"], rows))


def foot(runs):
    """How the runs were made: commands, settings, those that differ in columns, sizes and times."""
    settings = [run.result["settings"] for run in runs]
    parts = ["<h2>How it was made</h2>\n"]
    parts += [f"<p><code>{escape(command)}</code></p>\n"
              for command in dict.fromkeys(run.result["command"] for run in runs)]
    same, rows = [], []
    for key in dict.fromkeys(key for own in settings for key in own):
        values = [readable(own.get(key)) for own in settings]
        if len(set(values)) == 1:
            same.append(f"<li><span>{escape(words(key))}</span> {escape(values[0])}</li>\n")
        else:
            rows.append([words(key), *values])
    head = ["", *(run.name for run in runs)]
    if rows:
        parts.append("<h3>Settings that differ</h3>\n" + table(head, rows))
        parts.append("<h3>Settings in common</h3>\n")
    parts.append(f'<ul class="settings">{"".join(same)}</ul>\n')
    names = ("trainable_params", "kept_params", "head_params", "budget", "density", "kept_density",
             "best_score", "steps", "seconds", "examples_per_second", "peak_memory_mb", "labels")
    rows = [[words(key), *(run.result["metrics"].get(key) for run in runs)]
            for key in dict.fromkeys(key for run in runs for key in run.result["metrics"])]
    rows += [[words(key), *(run.result.get(key) for run in runs)] for key in names]
    parts.append(table(head, rows, numbers=range(1, len(head))))
    return "".join(parts)


def page_of(run):
    """The page of one run: title, HTML, the script's data."""
    result = run.result
    title = f"{result['method']} on {result['task']}"
    size = f"{result['kept_params']:,} of {result['trainable_params']:,}"
    head = f", without {result['head_params']:,} of the head" * bool(result["head_params"])
    values = {words(result["metric"]): f"{result['score']:.4f}", f"parameters{head}": size}
    if result["budget"] is not None:
        kept = f"kept, budget {100 * result['budget']:g} %"
        values[kept] = f"{100 * result['kept_density']:.2f} %"
    values |= {"steps": f"{result['steps']:,}", "seconds": f"{result['seconds']:.0f}"}
    charts, data = charts_of([run])
    parts = [f"<h1>{escape(title)}</h1>\n", tiles(values), charts]
    gates = None
    if run.gates:
        html, gates = player(run)
        parts.append(html)
    if result["ranks"]:
        r = result["settings"]["r"]
        origin = "as given" if result["settings"].get("ranks") else f"of {r} at the start"
        parts.append("<h2>Ranks</h2>\n" + rank_map(
            result["ranks"], r, f"Rank of each matrix, {origin}",
            "Kinds of matrices by layers. The stronger the color, the more triplets are left."))
    if result.get("answers"):
        parts.append(answers_of(result))
    parts.append(foot([run]))
    return title, "".join(parts), dict(charts=data, gates=gates)


def agreement(runs):
    """A sentence on how far apart the ranks of runs are."""
    pairs = [(list(a.result["ranks"].values()), list(b.result["ranks"].values()))
             for a, b in itertools.combinations(runs, 2)]
    apart = statistics.mean(abs(x - y) for a, b in pairs for x, y in zip(a, b))
    chance = statistics.mean(abs(x - y) for a, b in pairs for x in a for y in b)
    return (f"Two runs differ by {apart:.2f} triplets a matrix on average; with ranks shuffled "
            f"over the matrices it would be {chance:.2f}.")


def comparison(runs, file):
    """The page of several runs; the links in it are relative to `file`."""
    name_runs(runs)
    tasks, methods = (", ".join(dict.fromkeys(run.result[key] for run in runs))
                      for key in ("task", "method"))
    title = f"{methods} on {tasks}: {len(runs)} runs"
    groups, rows, top = {}, [], ""  # groups: of runs that differ in nothing but the seed
    for run in runs:
        own = run.result["settings"] | dict(seed=None, task=run.result["task"])
        groups.setdefault(json.dumps(own, sort_keys=True), []).append(run)
    for group in groups.values():
        scores, metric = [run.result["score"] for run in group], words(group[0].result["metric"])
        for run in group:
            result, own = run.result, run.folder / "report.html"
            link = (run.name, quote(os.path.relpath(own, file.parent)))
            rows.append([link if own.exists() else run.name, metric, f"{result['score']:.4f}",
                         f"{result['kept_params']:,}",
                         f"{100 * result['kept_density']:.2f} %", f"{result['seconds']:.0f}"])
        if len(group) > 1:
            mean = f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}"
            rows.append([f"mean ± deviation of {len(group)} seeds", metric, mean, "", "", ""])
            if len(groups) == 1:
                top = tiles({f"{metric}, mean ± standard deviation": mean,
                             "seeds": ", ".join(str(run.result["seed"]) for run in group)})
    head = ["run", "metric", "score", "parameters kept", "share", "seconds"]
    charts, data = charts_of(runs)
    parts = [f"<h1>{escape(title)}</h1>\n", top, table(head, rows, numbers=range(2, 6)), charts]

    ranked = [run for run in runs if run.result["ranks"]]
    learned = [run for run in ranked if len(set(run.result["ranks"].values())) > 1]
    maps = [rank_map(run.result["ranks"], run.result["settings"]["r"], run.name,
                     f"Rank of each matrix, of {run.result['settings']['r']} at the start.", 270)
            for run in ranked]
    agreed = ""
    if len(learned) > 1 and len({tuple(run.result["ranks"]) for run in learned}) == 1:
        agreed = f"<p>{agreement(learned)}</p>\n"
        spread = {path: max(values) - min(values) for path, *values in zip(
            learned[0].result["ranks"], *(run.result["ranks"].values() for run in learned))}
        r = max(run.result["settings"]["r"] for run in learned)
        maps.append(rank_map(spread, r, "How far they differ", "The largest rank less the "
                             "smallest: 0 where all agree.", 270, unit="difference"))
    if maps:
        parts.append(f'<h2>Ranks side by side</h2>\n{agreed}<div class="grid">\n{"".join(maps)}'
                     "</div>\n")
    return title, "".join([*parts, foot(runs)]), dict(charts=data, gates=None)


def write_page(folders, file):
    """The page of a run, or of several, as `file`. InputError: a folder that is not of a run."""
    runs = [read_run(folder) for folder in folders]
    title, body, data = page_of(runs[0]) if len(runs) == 1 else comparison(runs, Path(file))
    # no "</script>" in the data
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    parts = dict(title=escape(title), body=body, data=text)
    template = TEMPLATE.read_text(encoding="utf-8")
    write_text(Path(file), re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template))


def last_page(args, root):
    """Ends a command: writes the page over the seeds, and prints the page's path."""
    if RANK:
        return
    folders = [root] if args.seeds is None else [root / f"seed{seed}" for seed in args.seeds]
    for folder in folders:
        if not (folder / "report.html").exists():  # the run was killed just before its page
            write_page([folder], folder / "report.html")
    if args.seeds is not None:
        write_page(folders, root / "report.html")
    print(root / "report.html")


def main(argv):
    parser = new_parser(__doc__, prog="python -m paper.report")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run, or of "
                        "the runs of --seeds")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the "
                        "folder of the run; for several runs, give one)")
    parser.add_argument("--svg", metavar="FILE", help="the gates of a run as a picture instead")
    args = parser.parse_args(argv)
    for flag, ending in (("out", ".html"), ("svg", ".svg")):
        file = getattr(args, flag)
        need(not file or file.endswith(ending), f"--{flag}", file, f"a file that ends in {ending}")
    need(not (args.svg and args.out), "--out", "given", "none with --svg, which writes no page")
    folders = []
    for run in map(Path, args.runs):
        seeds = [file.parent for file in run.glob("seed*/result.json")]
        seeds.sort(key=lambda folder: (len(folder.name), folder.name))  # seed2 before seed10
        folders += [run] if (run / "result.json").exists() else seeds or [run]
    if args.svg:
        need(len(folders) == 1, "--svg", f"given with {len(folders)} runs", "one run")
        write_text(Path(args.svg), gates_svg(read_run(folders[0])))
    need(args.svg or args.out or len(args.runs) == 1, "--out", "not given",
         "a file for the page of several runs")
    if not args.svg:
        args.out = args.out or Path(args.runs[0]) / "report.html"
        write_page(folders, args.out)
    print(args.svg or args.out)


if __name__ == "__main__":
    run_command(main, None)
