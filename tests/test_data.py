"""Readers, downloads, batches and scores."""

import fnmatch
import functools
import http.server
import io
import json
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import ByteLevel

from data import InputError, download, glue, metrics, style
from data.batching import batch_order, collate, load_tokenizer, tokenize
from data.glue import HERE, TASKS, load_task, score
from data.instruct import load_instructions
from data.make_demo import make_data
from model import read_json

FIXTURES = Path(__file__).parent / "fixtures"

# Two rows of each split in GLUE's own layout, with what makes each file awkward: a bare quote, a
# BOM, no header, \r\n, U+2028.
MNLI = ("index\tpromptID\tpairID\tgenre\tp1\tp2\tp3\tp4\tsentence1\tsentence2\tlabel1\t"
        "{}gold_label\n"
        "0\tn\tn\tg\tp\tp\tp\tp\tA{}\tB\t{}\n1\tn\tn\tg\tp\tp\tp\tp\tC\tD\t{}\n")


def both(text):
    return {"train.tsv": text, "dev.tsv": text}


LAYOUT = {
    "CoLA": {"train.tsv": 'gj04\t1\t\tHe said "no.\ngj04\t0\t*\tHim said\u2028it.\n',
             "dev.tsv": "gj04\t1\t\tShe left.\ngj04\t0\t*\tShe leave."},
    "SST-2": {"train.tsv": "sentence\tlabel\ngood fun \t1\ndull \t0\n",
              "dev.tsv": "sentence\tlabel\nfine\t1\nbad\t0\n"},
    "MRPC": both("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
                 "1\t7\t8\tA \"b\tB a\n0\t9\t10\tC\tD\n"),
    "STS-B": both("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
                  "\tscore\n"
                  "0\tg\tf\t2012\t1\tn\tn\tA\tB\t5.000\n1\tg\tf\t2012\t2\tn\tn\tC\tD\t3.8\n"),
    "QQP": both("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\r\n"
                "1\t1\t2\tWhy?\tHow?\t0\r\nbroken row\r\n2\t3\t4\tA?\tB?\t1\r\n"),
    "MNLI": {"train.tsv": MNLI.format("", "", "neutral\tneutral", "x\tentailment"),
             **{f"dev_{m}matched.tsv": MNLI.format("label2\t", m, "x\tx\tcontradiction",
                                                   "x\tx\tneutral") for m in ("", "mis")}},
    "QNLI": both("index\tquestion\tsentence\tlabel\n"
                 "0\tWho?\tHe.\tentailment\n1\tWhy?\tNo.\tnot_entailment\n"),
    "RTE": both("index\tsentence1\tsentence2\tlabel\n"
                "0\tA\tB\tnot_entailment\n1\tC\tD\tentailment\n"),
    "WNLI": both("index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n1\tC\tD\t0\n"),
}
FIRST = {  # text, label number of the first training row, all training labels
    "cola": (('He said "no.',), [1, 0]), "sst2": (("good fun ",), [1, 0]),
    "mrpc": (('A "b', "B a"), [1, 0]), "stsb": (("A", "B"), [5.0, 3.8]),
    "qqp": (("Why?", "How?"), [0, 1]), "mnli": (("A", "B"), [1, 0]),
    "qnli": (("Who?", "He."), [0, 1]), "rte": (("A", "B"), [1, 0]),
    "wnli": (("A", "B"), [1, 0])}


def lay_out(folder, name):
    (folder / name).mkdir(parents=True)
    for file, text in LAYOUT[name].items():
        (folder / name / file).write_bytes(text.encode())
    return folder


@pytest.mark.parametrize("name", FIRST)
def test_nine_tasks_in_glues_own_layout(name, tmp_path, capsys):
    task, train, dev = load_task(name, lay_out(tmp_path, TASKS[name].folder))
    assert (train.texts[0], train.labels) == FIRST[name]
    assert len(train.texts) == 2
    assert [len(rows.labels) for rows in dev] == [2] * (2 if name == "mnli" else 1)
    assert task.num_labels == {"stsb": 1, "mnli": 3}.get(name, 2)
    said = "skipped 1 broken rows, the first in line 3" in capsys.readouterr().out
    assert said == (name == "qqp")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    for name, text in (("a.tsv", "sentence\tlabel\na\t1\n"), ("b", "good .\n"),
                       ("c.json", '[{"instruction": "a", "output": "b"}]'),
                       ("d.jsonl", '{"instruction": "a", "output": "b"}\n'), ("e.json", "{}")):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    assert glue.read_table(tmp_path / "a.tsv", True)[0] == ["sentence", "label"]
    assert style.read_lines(tmp_path / "b") == ["good ."]
    for name in ("c.json", "d.jsonl"):
        assert load_instructions(tmp_path / name) == [dict(instruction="a", input="", output="b")]
    assert read_json(tmp_path / "e.json") == {}


def test_broken_rows_of_qqp_do_not_count_and_a_file_of_nothing_else_is_refused(tmp_path):
    lay_out(tmp_path, "QQP")
    assert load_task("qqp", tmp_path, limit_train=2)[1].labels == [0, 1]
    header = LAYOUT["QQP"]["dev.tsv"].split("\r\n")[0]
    (tmp_path / "QQP" / "dev.tsv").write_text(header + "\n1\t1\t2\tWhy?\n" * 3)
    with pytest.raises(InputError, match="dev.tsv: all of its 3 rows are broken, the first in "
                                         "line 2; expected 6 columns"):
        load_task("qqp", tmp_path)


def test_outputs_have_the_names_that_the_tasks_are_published_with():
    names = {name: task.label_names for name, task in TASKS.items()}
    entailment = "entailment", "not_entailment"
    assert names == dict(
        cola=("unacceptable", "acceptable"), sst2=("negative", "positive"), stsb=None,
        mrpc=("not_equivalent", "equivalent"), qqp=("not_duplicate", "duplicate"),
        mnli=("entailment", "neutral", "contradiction"), qnli=entailment, rte=entailment,
        wnli=entailment[::-1], demo=("0", "1"))


def test_cola_without_header_or_last_newline_and_with_a_line_separator_in_the_text(tmp_path):
    _, train, dev = load_task("cola", lay_out(tmp_path, "CoLA"))
    assert train.texts[1] == ("Him said\u2028it.",)
    assert dev[0].texts == [("She left.",), ("She leave.",)]


def test_mnli_has_matched_and_mismatched_dev_sets(tmp_path):
    _, _, (matched, mismatched) = load_task("mnli", lay_out(tmp_path, "MNLI"))
    assert (matched.texts[0][0], mismatched.texts[0][0]) == ("A", "Amis")
    assert matched.labels == [2, 1]


def test_limits_take_the_first_rows():
    _, train, dev = load_task("demo", limit_train=5, limit_dev=3)
    assert (len(train.labels), len(dev[0].labels)) == (5, 3)
    assert train.texts == load_task("demo")[1].texts[:5]


def test_held_out_rows_take_the_place_of_dev_and_are_out_of_train():
    _, everything, _ = load_task("demo")
    _, train, (held,) = load_task("demo", hold_out=100)
    assert len(held.labels) == 100
    assert sorted(train.texts + held.texts) == sorted(everything.texts) != train.texts + held.texts
    assert 30 < sum(held.labels) < 70  # not the first or last rows of a file that may be sorted
    _, fewer, (again,) = load_task("demo", hold_out=100, limit_train=50, limit_dev=20)
    assert fewer.texts == train.texts[:50] and again.texts == held.texts[:20]  # always the same
    with pytest.raises(InputError, match="hold out fewer"):
        load_task("demo", hold_out=len(everything.labels))


@pytest.mark.parametrize("header,rows,labels,values,metric", [
    ("sentence\tlabel", ["a\tpos", "b\tneg"], ("neg", "pos"), [1, 0], "accuracy"),
    ("label\tid\tsentence", ["10\tx\ta", "2\tx\tb", "1\tx\tc"], ("1", "2", "10"), [2, 1, 0],
     "accuracy"),
    ("sentence\tlabel", ["a\tgood", "b\tgood \t"[:-1], "c\t poor", "", "d\tpoor", ""],
     ("good", "poor"), [0, 0, 1, 1], "accuracy"),
    (" sentence\tlabel ", ["a\t1 ", "b\t-1", "c\t0.5"], ("-1", "0.5", "1"), [2, 0, 1], "accuracy"),
    ("sentence1\tsentence2\tscore", ["a\tb\t1.5 ", "c\td\t-2"], None, [1.5, -2.0], "pearson")])
def test_own_tsv_folder(tmp_path, header, rows, labels, values, metric):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join([header, *rows]) + "\n")
    task, train, dev = load_task(str(tmp_path))
    assert (task.labels, train.labels, task.metric) == (labels, values, metric)


def test_which_of_two_columns_is_used_is_said(tmp_path, capsys):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(
            "sentence\tsentence1\tlabel\tscore\na\tx\t1\t2\nb\ty\t0\t3\n")
    assert load_task(str(tmp_path))[1].texts == [("a",), ("b",)]
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/train.tsv: has columns label and score; label is used",
        f"{tmp_path}/train.tsv: has columns sentence and sentence1; sentence is used"]


@pytest.mark.parametrize("train,dev,words", [
    (None, None, "train.tsv: not found"),
    (b"", None, "train.tsv: has no rows"),
    (b"sentence\tlabel\n", None, "has no rows"),
    (b"text\tlabel\na\t1\n", None, "columns are 'text', 'label', expected sentence"),
    (b"sentence label\na 1\n", None, "separated by tabs"),
    (b"sentence\tlabel\na\t1\nb\t1\n", None, "1 distinct values"),
    (b"sentence\tlabel\n\xff\t1\n", None, "byte 15 is not UTF-8"),
    (b"sentence\tlabel\na\t1\nb\n", None, "1 distinct values"),
    (b"sentence\tlabel\na\t1\nb\t0\nc\n", None, "line 4 has 1 columns, expected 2"),
    (b"sentence\tlabel\na\t1\nb\t0\nc\t \n", None, "train.tsv: line 4 has no label"),
    (b"sentence\tscore\na\tx\n", None, "line 2: score is 'x', expected a number"),
    (b"sentence\tscore\na\tnan\n", None, "expected a number"),
    (b"sentence\tlabel\na\t1\nb\t0\n", b"sentence\tlabel\na\t2\n",
     "dev.tsv: line 2: label is '2', expected one of 0, 1"),
    (b"sentence\tlabel\na\t1\nb\t0\n", b"label\n1\n", "dev.tsv: no column 'sentence'")])
def test_bad_tsv_is_named_by_file_and_line(tmp_path, train, dev, words):
    for name, content in (("train.tsv", train), ("dev.tsv", dev)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_task(str(tmp_path))


def test_given_data_folder_is_never_filled_by_a_download(tmp_path):
    with pytest.raises(InputError, match="CoLA/train.tsv: not found"):
        load_task("cola", tmp_path)


# ---- downloads, from a loopback server


def archive(name, extra=()):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for file, text in LAYOUT[name].items():
            z.writestr(f"{name}/{file}", text)
        for member, content in (("__MACOSX/x.tsv", "junk"), *extra):
            z.writestr(member, content)
    return out.getvalue()


SHA256 = download.SHA256  # the server's archives are not the real ones


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the files in tmp_path/www as GLUE's archives; a file `cut` is announced whole and sent
    by half."""
    www = tmp_path / "www"
    www.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, target):
            content = source.read()
            target.write(content[:len(content) // 2] if (www / "cut").exists() else content)

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=www)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        for name in ("GLUE_URL", "MRPC_URL"):
            monkeypatch.setattr(download, name, f"http://127.0.0.1:{httpd.server_port}/")
        monkeypatch.setattr(download, "SHA256", {})
        into = tmp_path / "data"
        into.mkdir()
        monkeypatch.setattr(glue, "HERE", into)
        yield www, into
        httpd.shutdown()


@pytest.mark.parametrize("name", [name for name in FIRST if name != "mrpc"])
def test_missing_task_is_downloaded_once_and_read(name, server):
    www, into = server
    folder = TASKS[name].folder
    (www / download.ARCHIVES[folder]).write_bytes(archive(folder))
    assert load_task(name)[1].labels == FIRST[name][1]
    (www / download.ARCHIVES[folder]).unlink()
    assert load_task(name)[1].labels == FIRST[name][1]  # from disk this time
    assert [p.name for p in into.iterdir()] == [folder]
    assert set(LAYOUT[folder]) == {p.name for p in (into / folder).iterdir()}


def test_two_processes_that_miss_a_task_download_it_once(server, monkeypatch):
    www, into = server
    (www / "CoLA.zip").write_bytes(archive("CoLA"))
    fetched, fetch = [], download.fetch

    def slow(url, file):
        fetched.append(url)
        time.sleep(0.3)
        fetch(url, file)

    monkeypatch.setattr(download, "fetch", slow)
    with ThreadPoolExecutor(2) as pool:  # locks of one process on two open folders differ, too
        both = list(pool.map(lambda _: load_task("cola")[1].labels, range(2)))
    assert both == [FIRST["cola"][1]] * 2 and len(fetched) == 1


def test_mrpc_is_split_by_dev_ids_as_glue_does(server):
    www, into = server
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = ["1\t7\t8\tA \"b\tB a\n", "0\t9\t10\tC\tD\n", "1\t3\t4\tE\tF\n"]
    (www / "msr_paraphrase_train.txt").write_text(header + "".join(rows))
    (www / "mrpc_dev_ids.tsv").write_text("9\t10\n")
    _, train, (dev,) = load_task("mrpc")
    assert train.texts == [('A "b', "B a"), ("E", "F")] and dev.texts == [("C", "D")]
    assert dev.labels == [0]


def bad_crc():
    content = bytearray(archive("CoLA"))
    at = content.index(b"CoLA/train.tsv") + len("CoLA/train.tsv") + 4
    content[at] ^= 0xFF  # inside the compressed data
    return bytes(content)


@pytest.mark.parametrize("content,words", [
    (None, "download failed .*404.*put the files in place by hand"),
    ("cut", "the download broke off after .* of .* bytes; run the command again"),
    (b"this is no archive", "CoLA.zip: not a sound zip archive"),
    (bad_crc(), "CoLA.zip: not a sound zip archive"),
    (archive("CoLA")[:-30], "not a sound zip archive"),
    (archive("CoLA", [("CoLA/../../evil.tsv", "x")]),
     "'CoLA/../../evil.tsv' points outside the archive"),
    (archive("CoLA", [("/tmp/evil.tsv", "x")]), "points outside the archive"),
    (archive("RTE"), "holds no CoLA/train.tsv")],
    ids=["absent", "cut", "text", "crc", "short", "parent", "absolute", "other"])
def test_bad_archive_leaves_nothing_behind(server, content, words):
    www, into = server
    if content == "cut":
        (www / "cut").touch()
        content = archive("CoLA")
    if content is not None:
        (www / "CoLA.zip").write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_task("cola")
    assert list(into.iterdir()) == [] and not list(into.parent.rglob("evil.tsv"))


def test_an_archive_with_another_checksum_is_not_used(server, monkeypatch):
    www, into = server
    (www / "CoLA.zip").write_bytes(archive("CoLA"))
    monkeypatch.setattr(download, "SHA256", SHA256)
    with pytest.raises(InputError, match="CoLA.zip: has the SHA-256 [0-9a-f]{64}, expected f212fc"):
        download.download_task("CoLA", into)
    assert list(into.iterdir()) == []
    names = {*download.ARCHIVES.values(), "msr_paraphrase_train.txt", "mrpc_dev_ids.tsv"}
    assert set(download.SHA256) == names


def test_https_does_not_become_http(tmp_path, monkeypatch):
    response = io.BytesIO(b"x")
    response.url, response.headers = "http://elsewhere/CoLA.zip", {}
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *args, **kw: response)
    with pytest.raises(InputError, match="redirected to http://elsewhere/CoLA.zip, which is not"):
        download.fetch(download.GLUE_URL + "CoLA.zip", tmp_path / "x")
    assert download.GLUE_URL.startswith("https:") and download.MRPC_URL.startswith("https:")


def test_archive_that_unpacks_to_too_much_is_refused(server, monkeypatch):
    www, into = server
    (www / "CoLA.zip").write_bytes(archive("CoLA", [("CoLA/test.tsv", "0" * 100_000)]))
    monkeypatch.setattr(download, "LIMIT", 50_000)
    with pytest.raises(InputError, match="unpacks to more than"):
        load_task("cola")
    assert list(into.iterdir()) == []


def test_unreachable_server_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "GLUE_URL", "http://127.0.0.1:9/")
    with pytest.raises(InputError, match="download failed .*check the connection"):
        download.download_task("RTE", tmp_path)


def test_model_folder_or_hub_name(tmp_path, monkeypatch):
    assert download.model_folder(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="no such folder"):
        download.model_folder("./nowhere")
    import huggingface_hub

    def offline(*args, **kw):
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError) as e:
        download.model_folder("roberta-base")
    assert "--model roberta-base" in str(e.value) and "no route" in str(e.value)
    assert "\n" not in str(e.value)
    files = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json",
             "model-00001-of-00002.safetensors"}  # all that is read of a folder

    def snapshot(name, allow_patterns):
        found = {file for file in {*files, "pytorch_model.bin", "tf_model.h5"}
                 if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)}
        assert found == files
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download.model_folder("roberta-base") == tmp_path / "roberta-base"


# ---- scores


@pytest.mark.parametrize("case", json.loads((FIXTURES / "metrics.json").read_text()),
                         ids=lambda c: f"{len(c['label'])}rows")
def test_scores_are_those_of_scikit_learn_and_scipy(case):
    for name in set(case) - {"label", "prediction"}:
        value = getattr(metrics, name)(case["label"], case["prediction"])
        assert value == pytest.approx(case[name], abs=1e-12, rel=1e-12), name


def test_degenerate_scores_are_zero():
    assert metrics.matthews_correlation([0, 1, 1], [1, 1, 1]) == 0
    assert metrics.matthews_correlation([1, 1], [1, 1]) == 0
    assert metrics.f1([0, 0], [0, 0]) == 0
    assert metrics.pearson([1, 2, 3], [2, 2, 2]) == 0 and metrics.spearmanr([1, 1], [1, 2]) == 0
    assert metrics.pearson([1.0], [2.0]) == 0


def test_ties_share_the_mean_of_their_ranks():
    assert metrics.average_ranks([3, 1, 3, 3, 2]).tolist() == [4, 1, 4, 4, 2]


def test_score_has_the_metrics_of_the_task():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
    assert score(TASKS["mrpc"], [0, 1, 0], logits) == pytest.approx(
        dict(accuracy=2 / 3, f1=2 / 3, matthews_correlation=0.5))
    assert set(score(TASKS["mnli"], [0, 1, 2], np.eye(3))) == {"accuracy", "matthews_correlation"}
    logits = np.array([[1.0], [3], [2]])
    assert score(TASKS["stsb"], [1.0, 2, 4], logits) == pytest.approx(
        dict(pearson=0.327326835, spearmanr=0.5))


# ---- tokens and batches


def test_tokens_have_special_tokens_pairs_and_truncation():
    tokenizer = load_tokenizer(HERE / "demo" / "model")
    texts = [("Mary slept.",), ("Mary slept.", "John fell.")]
    (single, _), (pair, _) = tokenize(tokenizer, texts, 64, 10_000)
    assert single[0] == 0 and single[-1] == 2 and pair[:len(single)] == single
    assert pair[len(single)] == 2  # <s> A </s></s> B </s>
    long = tokenize(tokenizer, [("Mary slept. " * 50, "John fell.")], 20, 10_000)[0][0]
    # the longer sentence was cut, the shorter one is whole
    assert len(long) == 20 and long[-len(pair) + len(single):] == pair[len(single):]


def test_token_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(InputError, match="vocab_size is 10: they do not belong together"):
        tokenize(load_tokenizer(HERE / "demo" / "model"), [("Mary slept.",)], 64, 10)


def test_a_text_without_a_token_is_refused():
    tokenizer = load_tokenizer(HERE / "demo" / "model")
    assert len(tokenize(tokenizer, [("",)], 64, 10_000)[0][0]) == 2  # <s></s>
    tokenizer.post_processor = ByteLevel()
    with pytest.raises(InputError, match="makes no token of '': give it"):
        tokenize(tokenizer, [("Mary slept.",), ("",)], 64, 10_000)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe"])
def test_bad_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_every_row_is_in_one_batch_and_little_is_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 60, 1000)
    one, two = (batch_order(lengths, 32, np.random.default_rng([7, epoch])) for epoch in (0, 1))
    assert sorted(i for batch in one for i in batch) == list(range(1000)) and len(one) == 32
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in one)
    assert padded < 1.08 * lengths.sum()
    assert {frozenset(b) for b in one} != {frozenset(b) for b in two}  # batches mix
    assert one == batch_order(lengths, 32, np.random.default_rng([7, 0]))
    tops = [max(lengths[i] for i in batch) for batch in one]
    # the longest first, the others in random order
    assert tops[0] == max(lengths) and tops[1:] != sorted(tops[1:])


def test_batches_of_a_real_distribution_of_lengths_hardly_need_padding_or_a_mask():
    """Lengths as in CoLA: many rows of each length. Every batch mixes rows that were apart in the
    epoch before."""
    lengths = np.random.default_rng(0).poisson(7, 4000) + 4
    batches = [[set(b) for b in batch_order(lengths, 32, np.random.default_rng(epoch))]
               for epoch in range(2)]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches[0]]
    assert sum(len(b) * max(lengths[i] for i in b) for b in batches[0]) < 1.02 * lengths.sum()
    assert np.mean(np.array(spread) == 0) > 0.7
    assert max(len(b & c) for b in batches[0] for c in batches[1] if len(b) == 32) < 24


def test_collate_pads_and_masks_only_what_needs_it():
    ids, mask, types = collate([([5, 6, 7], [0, 0, 1]), ([8], [0])], pad_id=1, device="cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert types.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert collate([([5], [0]), ([6], [0])], 1, "cpu")[1] is None
    assert collate([([5], [0]), ([6], [0])], 1, "cpu", always_mask=True)[1].tolist() == [[1], [1]]


# ---- the demo


def test_demo_data_is_what_its_script_makes():
    for name, text in make_data().items():
        same = text.encode() == (HERE / "demo" / name).read_bytes()
        assert same, name  # without a long diff


def test_demo_is_small_balanced_and_has_no_dev_sentence_in_train():
    assert sum(p.stat().st_size for p in (HERE / "demo").rglob("*") if p.is_file()) < 5 << 20
    _, train, (dev,) = load_task("demo")
    assert len(dev.labels) == 1000 and 0.5 < np.mean(dev.labels) < 0.7
    assert not set(train.texts) & set(dev.texts)


# ---- style transfer


def test_bleu_is_sacrebleus():
    for case in json.loads((FIXTURES / "bleu.json").read_text()):
        bleu = metrics.bleu(case["outputs"], case["references"])
        assert bleu == pytest.approx(case["bleu"], abs=1e-9)


@pytest.mark.parametrize("answer,direction,expected", [
    ('"The food isn\'t good, I\'d say."\nNote: changed.', "pos2neg",
     "the food is n't good , i 'd say ."),
    ("\n\n  GREAT (really)!  ", "neg2pos", "great ( really ) !"),
    ('"I am very pleased."', "informal2formal", "I am very pleased."),
    ("", "neg2pos", "")])
def test_answers_are_brought_into_the_form_of_the_data(answer, direction, expected):
    assert style.tidy(answer, direction) == expected


def test_yelp_and_gyafc_files_belong_line_to_line(tmp_path):
    (tmp_path / "test").mkdir()
    for name, text in {
            "test.neg": "bad .\nworse .\n", "ref0.neg2pos": "good .\nbetter .\n",
            "ref_li.neg2pos.tsv": "", "ref1.neg2pos": "bad .\tfine .\nworse .\tok .\n",
            "test/informal": "hi u\n", "test/formal.ref0": "Hello.\n",
            "test/formal.ref1": "Good day.\n"}.items():
        (tmp_path / name).write_text(text)
    assert style.read_task(tmp_path, "neg2pos") == (
        ["bad .", "worse ."], [["good .", "better ."], ["fine .", "ok ."]])
    assert style.read_task(tmp_path, "informal2formal") == (["hi u"], [["Hello."], ["Good day."]])
    (tmp_path / "ref0.neg2pos").write_text("good .\n")
    with pytest.raises(InputError, match="ref0.neg2pos: has 1 lines, but .*test.neg has 2"):
        style.read_task(tmp_path, "neg2pos")
    with pytest.raises(InputError, match="GYAFC is licensed: ask its authors"):
        style.read_task(tmp_path, "formal2informal")


def test_sentences_for_a_classifier_of_styles(tmp_path):
    for name in ("train_sub.neg", "train_sub.pos", "dev.neg", "dev.pos"):
        (tmp_path / name).write_text("".join(f"{name} {i} .\n" for i in range(5)))
    style.classifier_data(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="out/train.tsv: already exists; give another folder"):
        style.classifier_data(tmp_path, tmp_path / "out")
    task, train, dev = load_task(str(tmp_path / "out"))
    assert task.labels == ("neg", "pos") and sorted(train.labels) == [0] * 5 + [1] * 5
    assert train.labels != sorted(train.labels) and len(dev[0].texts) == 10
    assert all(("neg" in text) == (label == 0) for (text,), label in zip(train.texts, train.labels))
