"""A model folder's tokenizer gives the tokens that transformers' does. The right values are those
of AutoTokenizer in transformers 5.23.0 for the folders that `folder_of` writes."""

import json

import pytest
from test_adapters import FIXTURES

from data import InputError
from data.batching import load_tokenizer, tokenize
from data.instruct import encode

DEMO = FIXTURES.parent.parent / "data" / "demo"
WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] the old boy cafe café Boy # ##s 你 好 你好 [ ] "
         "cls").split()
BERT = dict(
    version="1.0", added_tokens=[], decoder=None, truncation=None, padding=None,
    normalizer=dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True,
                    strip_accents=None, lowercase=False),
    pre_tokenizer=dict(type="BertPreTokenizer"), post_processor=None,
    model=dict(type="WordPiece", unk_token="[UNK]", continuing_subword_prefix="##",
               max_input_chars_per_word=100, vocab={word: i for i, word in enumerate(WORDS)}))
PIECES = "<unk> <s> </s> ▁ a b c ▁a ▁b <0x64> <x>".split()
METASPACE = dict(  # as LLaMA 2 is stored
    version="1.0", added_tokens=[], decoder=None, truncation=None, padding=None,
    normalizer=dict(type="Sequence", normalizers=[
        dict(type="Prepend", prepend="▁"),
        dict(type="Replace", pattern=dict(String=" "), content="▁")]),
    pre_tokenizer=None, post_processor=dict(
        type="TemplateProcessing", single=[
            dict(SpecialToken=dict(id="<s>", type_id=0)), dict(Sequence=dict(id="A", type_id=0))],
        pair=[dict(Sequence=dict(id="A", type_id=0)), dict(Sequence=dict(id="B", type_id=1))],
        special_tokens={"<s>": dict(id="<s>", ids=[1], tokens=["<s>"])}),
    model=dict(type="BPE", dropout=None, unk_token="<unk>", fuse_unk=True, byte_fallback=True,
               vocab={piece: i for i, piece in enumerate(PIECES)}, merges=["▁ a", "▁ b"]))
PLAIN = dict(tokenizer_class="PreTrainedTokenizerFast")
BOY, PAIR = ("The old Boys 你好 café",), ("the", "old boys")
DEMO_TEXT, LEFT = ("Mary slept.",), dict(max_length=3, strategy="LongestFirst", stride=0,
                                         direction="Left")
NEW = dict(content="<new>", lstrip=True, rstrip=False, normalized=False, single_word=False,
           special=True)


def folder_of(tmp_path, base, file, config, **more):
    """Writes a folder with a tokenizer alone. base: a tokenizer.json, or a model of the demo whose
    is taken; file: changes to it; config: tokenizer_config.json; more: other JSON files."""
    name = "llama" if base in (METASPACE, "llama") else "bert" if base is BERT else "roberta"
    if isinstance(base, str):
        base = json.loads((DEMO / base / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(base | file))
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=name)))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for key, value in more.items():
        (tmp_path / f"{key}.json").write_text(json.dumps(value))
    return tmp_path


CASES = [  # tokenizer.json, changes, tokenizer_config.json, text, length, ids
    (BERT, {}, None, BOY, 99, [2, 5, 6, 7, 12, 13, 14, 8, 3]),
    (BERT, {}, dict(do_lower_case=False), BOY, 99, [2, 1, 6, 10, 12, 13, 14, 9, 3]),
    (BERT, {}, dict(do_lower_case=True, strip_accents=False), BOY,
     99, [2, 5, 6, 7, 12, 13, 14, 9, 3]),
    (BERT, {}, dict(do_lower_case=False, strip_accents=True), BOY,
     99, [2, 1, 6, 10, 12, 13, 14, 8, 3]),
    (BERT, {}, dict(tokenize_chinese_chars=False), BOY, 99, [2, 5, 6, 7, 12, 15, 8, 3]),
    (BERT, {}, PLAIN, BOY, 99, [1, 6, 10, 12, 13, 14, 9]),
    (BERT, {}, {}, ("the [CLS] boy",), 99, [2, 5, 2, 7, 3]),
    (BERT, {}, {}, PAIR, 99, [2, 5, 3, 6, 7, 12, 3]),
    (BERT, {}, dict(model_input_names=["input_ids", "attention_mask"]), PAIR,
     99, [2, 5, 3, 6, 7, 12, 3]),
    (BERT, dict(truncation=LEFT), {}, BOY, 5, [2, 13, 14, 8, 3]),
    (BERT, {}, dict(truncation_side="left"), BOY, 5, [2, 13, 14, 8, 3]),
    (BERT, {}, dict(added_tokens_decoder={"19": NEW}), ("the <new> boy",), 99, [2, 5, 19, 7, 3]),
    ("model", {}, {}, DEMO_TEXT, 99, [0, 565, 607, 18, 2]),
    ("model", {}, dict(add_prefix_space=True), DEMO_TEXT, 99, [0, 612, 607, 18, 2]),
    ("model", dict(post_processor=None), None, ("Mary", "slept."),
     99, [0, 565, 2, 2, 87, 286, 606, 18, 2]),
    ("model", dict(truncation=LEFT), PLAIN, DEMO_TEXT, 99, [0, 565, 607, 18, 2]),
    ("llama", dict(truncation=LEFT), None, DEMO_TEXT, 99, [1, 769, 753, 16]),
    ("llama", {}, dict(add_bos_token=False, add_eos_token=True), DEMO_TEXT, 99, [1, 769, 753, 16]),
    ("llama", {}, dict(tokenizer_class="LlamaTokenizer", legacy=False), DEMO_TEXT,
     99, [1, 769, 753, 16]),
    (METASPACE, {}, None, ("a b</s>c d",), 99, [1, 7, 8, 0, 6, 3, 9]),
    (METASPACE, {}, dict(tokenizer_class="LlamaTokenizer"), ("a b</s>c d",),
     99, [1, 7, 8, 2, 6, 3, 9]),
    (METASPACE, {}, dict(tokenizer_class="LlamaTokenizer", legacy=True), ("a b</s>c d",),
     99, [1, 7, 8, 2, 3, 6, 3, 9]),
    (METASPACE, {}, dict(tokenizer_class="LlamaTokenizer", add_prefix_space=False), ("a b</s>c d",),
     99, [1, 4, 8, 2, 6, 3, 9]),
    (METASPACE, {}, dict(PLAIN, split_special_tokens=True, eos_token="</s>"), ("a </s>",),
     99, [1, 7, 3, 0]),
]


@pytest.mark.parametrize("base,file,config,text,length,ids", CASES)
def test_tokens_are_those_of_transformers(base, file, config, text, length, ids, tmp_path, capsys):
    folder = folder_of(tmp_path, base, file, config)
    assert tokenize(load_tokenizer(folder), [text], length, 10_000)[0][0] == ids
    # nothing is read in another way than tokenizer.json says without a word
    stored = json.loads((folder / "tokenizer.json").read_text())
    said = capsys.readouterr().out
    if config == dict(do_lower_case=False):
        assert said == ""
    if config is None and base is BERT:
        assert said.startswith(f"{folder / 'tokenizer.json'}: its normalizer ")
        assert stored["normalizer"]["lowercase"] is False and '"lowercase": true' in said


@pytest.mark.parametrize("config,types", [
    ({}, [0, 0, 0, 1, 1, 1, 1]),
    (dict(model_input_names=["input_ids", "attention_mask"]), [0] * 7)])
def test_token_types_of_two_sentences_are_those_of_transformers(config, types, tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, BERT, {}, config))
    assert tokenize(tokenizer, [PAIR], 99, 10_000)[0][1] == types


def test_padding_and_truncation_in_the_file_leave_prompts_whole(tmp_path):
    padding = dict(strategy=dict(Fixed=50), direction="Left", pad_to_multiple_of=8, pad_id=0,
                   pad_type_id=0, pad_token="<unk>")
    folder = folder_of(tmp_path, "llama", dict(truncation=LEFT, padding=padding), None)
    row = dict(instruction="The old boy sleeps. (past)", input="", output="The old boy slept.")
    there, = encode(load_tokenizer(folder), [row], "alpaca", 2, 200, 920)
    whole, = encode(load_tokenizer(DEMO / "llama"), [row], "alpaca", 2, 200, 920)
    assert there == whole and len(there.prompt) == 39


def test_tokens_of_older_files_are_known_and_their_ids_are_checked(tmp_path):
    more = dict(added_tokens={"<new>": 19}, special_tokens_map=dict(mask_token="<new>"))
    tokenizer = load_tokenizer(folder_of(tmp_path, BERT, {}, {}, **more))
    assert tokenize(tokenizer, [("the <new>",)], 99, 100)[0][0] == [2, 5, 19, 3]
    with pytest.raises(InputError, match="added token '<new>' should have the id 30, and is 19"):
        load_tokenizer(folder_of(tmp_path, BERT, {}, {}, added_tokens={"<new>": 30}))


@pytest.mark.parametrize("config,words", [
    (dict(tokenizer_class="CanineTokenizer"), "without what a CanineTokenizer would"),
    (PLAIN, "has no post-processor, so texts get no first"),
    (dict(tokenizer_class="RobertaTokenizer"), "its WordPiece is used as it is")])
def test_what_is_not_as_in_transformers_or_odd_is_said(config, words, tmp_path, capsys):
    load_tokenizer(folder_of(tmp_path, BERT, {}, config))
    said = capsys.readouterr().out
    assert words in said and all(line.startswith(str(tmp_path)) for line in said.splitlines())


@pytest.mark.parametrize("config", [
    dict(added_tokens_decoder=[3]), dict(do_lower_case="no"), dict(cls_token=3),
    dict(tokenizer_class=7), dict(added_tokens_decoder={"x": NEW}), dict(model_input_names=3)])
def test_a_damaged_tokenizer_config_is_one_line(config, tmp_path):
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(folder_of(tmp_path, BERT, {}, config))
