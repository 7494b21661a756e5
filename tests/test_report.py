"""
The page of a run: every number on it is one of result.json, log.jsonl or gates.jsonl, and a browser
shows it. The browser's tests are left out where there is no Chromium.
"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import train_glue
import train_instruct
from data import InputError
from paper import report
from training import loop
from training.runs import run_command

SHORT = ["--limit-train", "200", "--limit-dev", "90", "--epochs", "2", "--log-every", "1",
         "--threads", "1", "--window", "0.2", "0.5"]  # of 14 steps the window is steps 3 to 6
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


def run(out, *flags):
    train_glue.main([*SHORT, "--out", str(out), *flags])
    return json.loads((out / "result.json").read_text())


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


class Page(HTMLParser):
    """What a browser makes of a page: its elements, its words, the data of its script."""

    void = {"meta", "input"}

    def __init__(self, file):
        super().__init__()
        self.elements, self.texts, self.inside = [], [], []
        self.feed(Path(file).read_text())
        assert not self.inside  # every element is closed
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.void:
            self.inside.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, text):
        if self.inside and self.inside[-1] not in ("script", "style"):
            self.texts.append(text)
        elif text.startswith('{"charts"'):
            self.data = json.loads(text)

    def curves(self):
        """{name: [(x, y) ..]} of all charts."""
        return {line["name"]: list(zip(line["x"], line["y"]))
                for chart in self.data["charts"].values() for line in chart["lines"]}


def close(points):
    """To the five digits of the page."""
    return [(x, pytest.approx(y, rel=1e-4)) for x, y in points]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    return out, run(out)


# ---- what a run leaves


def test_gates_are_logged_from_the_opening_of_the_window_to_the_choice(short):
    out, result = short
    gates, log = lines_of(out / "gates.jsonl"), lines_of(out / "log.jsonl")
    assert [line["step"] for line in gates] == [2, 3, 4, 5, 6]  # 3 steps are taken; all 7
    assert [line["density"] for line in gates[:-1]] == [log[i]["density"] for i in (2, 3, 4, 5)]
    assert gates[-1]["density"] == result["density"]
    assert all(len(line["open"]) == 24 and {len(row) for row in line["open"]} == {8}
               for line in gates)
    sizes = [256, 256, 256, 256, 640, 640] * 4  # d + k of a triplet
    for line in gates:  # eq. 11, of what was written
        share = sum(size * sum(row) for size, row in zip(sizes, line["open"])) / (8 * sum(sizes))
        assert share == pytest.approx(line["density"], abs=1e-3)
    kept = gates[-1]["kept"]
    assert [sum(row) for row in kept] == list(result["ranks"].values())
    for row, stays in zip(gates[-1]["open"], kept):  # within a matrix the surest stay
        assert sorted(zip(row, stays))[8 - sum(stays):] == [
            pair for pair in sorted(zip(row, stays)) if pair[1]]
    assert not any("kept" in line for line in gates[:-1])


@pytest.mark.slow
def test_a_long_window_has_some_fifty_lines(tmp_path):
    run(tmp_path, "--epochs", "15", "--limit-train", "8", "--batch-size", "1", "--window", "0.05",
        "0.95", "--limit-dev", "5")  # 120 steps, 108 of them in the window
    steps = [line["step"] for line in lines_of(tmp_path / "gates.jsonl")]
    assert steps == list(range(5, 114, 3))


@pytest.mark.slow
def test_a_stopped_run_has_a_whole_page(short, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def stop(*args):
        raise SystemExit

    for step in (4, 5):  # in the window; the checkpoint is of the step before, or of this one
        with monkeypatch.context() as m:
            m.setattr(loop.Log, "write", lambda self, at, *rest, write=loop.Log.write, step=step:
                      stop() if at == step else write(self, at, *rest))
            with pytest.raises(SystemExit):
                run(out, "--save-every", "1", "--resume")
        with (out / "gates.jsonl").open("a") as file:
            file.write('{"step": 5, "open": [[0.')  # the machine lost its power here
    run(out, "--save-every", "1", "--resume")
    assert (out / "gates.jsonl").read_bytes() == (short[0] / "gates.jsonl").read_bytes()
    assert Page(out / "report.html").data == Page(short[0] / "report.html").data


@pytest.mark.slow
def test_the_page_is_the_last_line_and_the_budget_beside_the_density(tmp_path, capsys):
    result = run(tmp_path / "r", "--budget", "0.4")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "r" / "report.html") and lines[-2].startswith("next: ")
    assert any("density 0.917 (budget 0.4) lambda 0.000" in line for line in lines)
    assert result["command"] == " ".join(
        ["python train_glue.py", *SHORT, "--out", str(tmp_path / "r"), "--budget", "0.4"])
    (tmp_path / "r" / "report.html").unlink()  # killed after result.json
    run(tmp_path / "r", "--budget", "0.4", "--resume")
    assert Page(tmp_path / "r" / "report.html").data["gates"]
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]
    train_glue.main([*SHORT, "--out", str(tmp_path / "r"), "--overwrite", "--method", "lora"])
    assert not (tmp_path / "r" / "gates.jsonl").exists()
    assert Page(tmp_path / "r" / "report.html").data["gates"] is None


# ---- what is on the page


def test_every_number_is_that_of_the_run(short):
    out, result = short
    page, log = Page(out / "report.html"), lines_of(out / "log.jsonl")
    curves = page.curves()
    for name in ("task loss", "density", "lambda", "orth a", "orth b"):
        assert close((line["step"] + 1, line[name.replace(" ", "_")]) for line in log) \
            == curves[name]
    for name in ("accuracy", "matthews_correlation", "f1"):
        assert close((h["epoch"], h[name]) for h in result["history"]) \
            == curves[name.replace("_", " ")]
    assert curves["budget"] == [(1, 0.5), (14, 0.5)]
    ranks = re.findall(r'<title>(\S+): rank (\d+) of 8</title>.*?class="rank[^>]*>(\d+)</text>',
                       (out / "report.html").read_text())
    assert {path: (int(rank), int(shown)) for path, rank, shown in ranks} \
        == {path: (rank, rank) for path, rank in result["ranks"].items()}
    for words in (f"{result['score']:.4f} matthews correlation",
                  f"{result['kept_params']:,} of {result['trainable_params']:,} parameters",
                  f"{100 * result['kept_density']:.2f} % kept, budget 50 %",
                  f"python train_glue.py {' '.join(SHORT)}", "model data/demo/model", "seed 0",
                  "window 0.2 0.5", f"seconds {result['seconds']:.5g}",
                  f"peak memory mb {result['peak_memory_mb']:.5g}"):
        assert words in page.text, words


def test_the_gates_on_the_page_are_those_of_the_log(short):
    out, result = short
    page, gates = Page(out / "report.html").data["gates"], lines_of(out / "gates.jsonl")
    assert page["paths"] == list(result["ranks"]) and page["r"] == 8 and page["steps"] == 14
    *moments, choice = page["frames"]
    assert [m["step"] for m in moments] == [line["step"] + 1 for line in gates]

    def values(frame):
        return [int(frame["open"][i:i + 2]) / 99 for i in range(0, len(frame["open"]), 2)]

    for moment, line in zip(moments, gates):
        assert values(moment) == pytest.approx(sum(line["open"], []), abs=0.0052)
        assert moment["density"] == pytest.approx(line["density"], rel=1e-4)
    assert values(choice) == sum(gates[-1]["kept"], []) and choice["choice"]
    assert choice["density"] == pytest.approx(result["kept_density"], rel=1e-4)


@pytest.mark.parametrize("method", [
    "lora", *(pytest.param(name, marks=pytest.mark.slow)
              for name in ("adalora", "lora-svd", "ft", "prompt"))])
def test_methods_without_gates_have_a_page_without_them(method, tmp_path):
    result = run(tmp_path, "--method", method)
    page = Page(tmp_path / "report.html")
    assert page.data["gates"] is None and "slider" not in page.text
    assert not any(attributes.get("id") == "slider" for _, attributes in page.elements)
    curves = page.curves()
    assert ("density" in curves) == (method in ("adalora", "lora-svd"))
    assert ("Rank of each matrix" in page.text) == bool(result["ranks"])
    assert "task loss" in curves and "f1" in curves and "lambda" not in curves


@pytest.mark.slow
def test_instructions_have_their_answers_before_and_after(tmp_path):
    train_instruct.main(["--limit-train", "96", "--limit-dev", "20", "--max-steps", "5",
                         "--generate", "4", "--window", "0.2", "0.6", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    rows = [line.split("\t") for line in (tmp_path / "predictions.tsv").read_text().splitlines()]
    assert [(a["reference"], a["after"]) for a in result["answers"]] \
        == [tuple(row[1:]) for row in rows[1:]]
    page = Page(tmp_path / "report.html")
    for answer in result["answers"]:
        same = "✓ " * (answer["after"] == answer["reference"])
        words = f"{answer['instruction']} {answer['input']} {answer['reference']} " \
            f"{answer['before']} {same}{answer['after']}"
        assert " ".join(words.split()) in page.text
    assert {"loss", "perplexity", "task loss", "density"} <= page.curves().keys()
    assert page.data["gates"]["paths"] == list(result["ranks"])


@pytest.mark.slow
def test_seeds_are_compared_on_one_page(tmp_path, capsys):
    train_glue.main([*SHORT, "--seeds", "3", "5", "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.html")
    summary = json.loads((tmp_path / "summary.json").read_text())
    page = Page(tmp_path / "report.html")
    assert f"{summary['mean']:.4f} ± {summary['std']:.4f}" in page.text
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == ["seed3/report.html", "seed5/report.html"]
    assert all((tmp_path / link).exists() for link in links)
    a, b = (json.loads((tmp_path / f"seed{seed}" / "result.json").read_text()) for seed in (3, 5))
    charts = list(page.data["charts"].values())
    assert [line["name"] for line in charts[0]["lines"]] == ["seed 3", "seed 5"]
    for line, result in zip(charts[0]["lines"], (a, b)):
        assert line["y"] == [pytest.approx(h["matthews_correlation"], rel=1e-4)
                             for h in result["history"]]
    apart = sum(abs(a["ranks"][path] - b["ranks"][path]) for path in a["ranks"]) / 24
    assert f"Two runs differ by {apart:.2f} triplets a matrix" in page.text
    maps = re.findall(r": (rank|difference) (\d+) of 8</title>",
                      (tmp_path / "report.html").read_text())
    assert [int(value) for _, value in maps] == [
        *a["ranks"].values(), *b["ranks"].values(),
        *(abs(a["ranks"][path] - b["ranks"][path]) for path in a["ranks"])]


@pytest.mark.slow
def test_methods_are_compared(short, tmp_path, capsys):
    run(tmp_path / "lora", "--method", "lora")
    report.main([str(short[0]), str(tmp_path / "lora"), "--out", str(tmp_path / "both.html")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    charts = list(page.data["charts"].values())
    assert [line["name"] for line in charts[0]["lines"]] == ["salora", "lora"]
    assert "method salora lora" in page.text and "salora, lora on demo: 2 runs" in page.text


# ---- whatever stands in the files


EVIL = "</script><script>alert('x')</script>&amp;\" onload=\"{{data}}"


def test_text_from_outside_is_text(short, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(short[0], out)
    result = json.loads((out / "result.json").read_text())
    for name in ("task", "command"):
        result[name] = EVIL
    result["labels"] = [EVIL, "</main>"]
    result["metrics"][EVIL] = 0.5
    result["settings"]["model"] = EVIL
    result["history"] = [entry | {EVIL: 0.25} for entry in result["history"]]
    result["ranks"] = {f"{path}.{EVIL}": rank for path, rank in result["ranks"].items()}
    result["answers"] = [dict.fromkeys(("instruction", "input", "reference", "before", "after"),
                                       EVIL)]
    (out / "result.json").write_text(json.dumps(result))
    report.main([str(out)])
    page, plain = Page(out / "report.html"), Page(short[0] / "report.html")
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"table"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(EVIL) > 24 + 7
    assert page.data["gates"]["paths"] == list(result["ranks"])
    shutil.copytree(out, tmp_path / "<b>")
    report.main([str(out), str(tmp_path / "<b>"), "--out", str(tmp_path / "both.html")])
    assert not any(tag == "b" and attributes for tag, attributes in
                   Page(tmp_path / "both.html").elements)


def test_what_is_not_a_run_is_one_line(short, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(report.main, [str(tmp_path / "none")])
    assert stopped.value.code == 2 and capsys.readouterr().err == (
        f"error: {tmp_path / 'none'}: has no result.json, expected the folder of a finished run\n")
    with pytest.raises(InputError, match="--out is not given, expected a file for the page of"):
        report.main([str(short[0]), str(short[0])])
    for flags, words in ((["--out", "result.json"], "expected a file that ends in .html"),
                         (["--svg", "a.svg", "--out", "a.html"], "expected none with --svg")):
        with pytest.raises(InputError, match=words):
            report.main([str(short[0]), *flags])
    for name, text, words in [
            ("log.jsonl", "{", "log.jsonl: line 15 is damaged"),
            ("gates.jsonl", '{"step": 7}', "gates.jsonl: line 6 is damaged"),
            ("gates.jsonl", '{"step": 7, "density": 0.5, "open": [[1]]}',
             "gates.jsonl: line 6 is not of the 24 matrices"),
            ("result.json", None, "has no budget, command, head_params, history, kept_density")]:
        out = tmp_path / f"{name}{len(words)}"
        shutil.copytree(short[0], out)
        before = (out / "report.html").read_bytes()
        if text:
            with (out / name).open("a") as file:
                file.write(text + "\n")
        else:
            (out / name).write_text('{"score": 0.5, "settings": {}}')
        with pytest.raises(InputError, match=words):
            report.main([str(out)])
        assert (out / "report.html").read_bytes() == before
    shutil.copytree(short[0], tmp_path / "plain")
    (tmp_path / "plain" / "gates.jsonl").unlink()
    with pytest.raises(InputError, match="has no gates.jsonl"):
        report.main([str(tmp_path / "plain"), "--svg", str(tmp_path / "gates.svg")])
    assert not (tmp_path / "gates.svg").exists()


def test_a_model_of_24_layers_stays_below_300_kb(short, tmp_path):
    result = json.loads((short[0] / "result.json").read_text())
    log, gates = lines_of(short[0] / "log.jsonl"), lines_of(short[0] / "gates.jsonl")
    names = [path.split(".", 4)[4] for path in list(result["ranks"])[:6]]
    result["ranks"] = {f"roberta.encoder.layer.{i}.{name}": 4 for i in range(24) for name in names}
    result |= dict(steps=9000)
    gates = [dict(step=4500 + 18 * i, density=0.71234567,
                  open=[[round(((7 * j + i) % 97) / 97, 3) for j in range(8)]] * 144)
             for i in range(51)]
    gates[-1]["kept"] = [[1, 0] * 4] * 144
    log = [log[5] | dict(step=10 * i, task_loss=1 / (i + 3), orth_a=1 / (i + 7))
           for i in range(900)]
    (tmp_path / "result.json").write_text(json.dumps(result))
    for name, lines in (("log", log), ("gates", gates)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    report.main([str(tmp_path)])
    assert (tmp_path / "report.html").stat().st_size < 300_000
    assert len(Page(tmp_path / "report.html").data["gates"]["frames"]) == 52


def test_the_picture_of_the_gates_is_svg(short, tmp_path):
    report.main([str(short[0]), "--svg", str(tmp_path / "gates.svg")])
    tree = ElementTree.parse(tmp_path / "gates.svg")
    svg = "{http://www.w3.org/2000/svg}"
    texts = ["".join(text.itertext()) for text in tree.iter(f"{svg}text")]
    assert any(text.startswith("step 3: density") for text in texts)
    assert "step 7: the choice" in texts
    opacities = [float(path.get("opacity")) for path in tree.iter(f"{svg}path")]
    kept = sum(lines_of(short[0] / "gates.jsonl")[-1]["kept"], [])
    assert len(opacities) == 4 * 192 and opacities[-192:] == kept


# ---- in a browser


def open_page(file, tmp_path, fragment="", script=""):
    """(the document after its scripts have run, what the console got) of a page; script: what a
    user does."""
    copy = tmp_path / "copy.html"
    text = Path(file).read_text()
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run", "--dump-dom",
         "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--virtual-time-budget=20000", f"{copy.as_uri()}{fragment}"],
        capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert "</html>" in done.stdout, done.stderr
    return done.stdout, console


def opacities(document):
    cells = re.search(r'<figure id="gates">.*?</figure>', document, re.S)[0]
    return [float(value) for value in re.findall(r'<path d="[^"]*" opacity="([\d.]+)"', cells)]


@browser
@pytest.mark.parametrize("fragment,script,moment", [
    ("", "", 0),
    ("", "slider.value = 2; slider.dispatchEvent(new Event('input'))", 2),
    ("#step=6", "", 3),
    ("", "play.click()", 5)], ids=["opened", "slider", "address", "play"])
def test_browser_shows_the_gates_of_the_moment(fragment, script, moment, short, tmp_path):
    script = script and f"{{const slider = document.getElementById('slider'), " \
        f"play = document.getElementById('play'); {script}}}"
    document, console = open_page(short[0] / "report.html", tmp_path, fragment, script)
    assert console == []  # a request would be here, too: the page's own policy forbids all
    gates = lines_of(short[0] / "gates.jsonl")
    tables = [line["open"] for line in gates] + [gates[-1]["kept"]]
    assert opacities(document) == pytest.approx(sum(tables[moment], []), abs=0.011)
    shown = re.search(r'<output id="moment">([^<]*)', document)[1]
    if moment == 5:
        assert shown.startswith(f"step 7 of 14, the choice: {sum(sum(tables[5], []))} of 192 ")
    else:
        assert shown.startswith(f"step {moment + 3} of 14: density {gates[moment]['density']:.3f}")
    density = lines_of(short[0] / "log.jsonl")[min(moment, 4) + 2]["density"]
    readout = re.search(r"density ([\d.]+), budget 0.5</output>", document)[1]
    assert float(readout) == pytest.approx(density, rel=1e-4)


@browser
def test_browser_reads_out_a_curve_and_a_cell(short, tmp_path):
    script = """
    const chart = document.querySelector("#chart1 .chart"), box = chart.getBoundingClientRect();
    const at = (322 - 40) / 13 * 9 + 40;  // step 10 of 1 to 14
    const clientX = box.left + at / 340 * box.width;
    chart.dispatchEvent(new PointerEvent("pointermove", {clientX}));
    const ranks = document.querySelectorAll(".map"), cell = ranks[1].querySelectorAll(".level")[5];
    cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));"""
    document, console = open_page(short[0] / "report.html", tmp_path, script=script)
    assert console == []
    loss = lines_of(short[0] / "log.jsonl")[9]["task_loss"]
    shown = re.search(r"step 10: task loss ([\d.]+)</output>", document)[1]
    assert float(shown) == pytest.approx(loss, rel=1e-4)
    path, rank = list(short[1]["ranks"].items())[5]
    assert f'<output class="hint">{path}: rank {rank} of 8</output>' in document


@pytest.mark.slow
@browser
def test_browser_would_tell_of_an_error_and_of_a_request(short, tmp_path):
    for script, words in (("undefined.x", "TypeError"),
                          ("fetch('https://example.com/')", "Content Security Policy")):
        assert words in "".join(open_page(short[0] / "report.html", tmp_path, script=script)[1])
