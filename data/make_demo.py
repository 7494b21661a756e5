"""
Makes everything in data/demo: an acceptability task in CoLA's layout, and a small RoBERTa trained
on the grammar's good sentences; instructions about such sentences, and a small LLaMA trained on
similar text, but never on an answer to a prompt in Alpaca's form.

    python -m data.make_demo            # data in seconds, then 40 minutes of training on 2 cores
    python -m data.make_demo data       # data only; likewise roberta, llama

A row of the task is a sentence or a minimal corruption of it; the first column names the
phenomenon, where CoLA names the source. Sentences and instructions are the same bytes on every
machine, weights only on the same machine, torch build and number of threads.
"""

import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence

from data.instruct import fill
from model import Decoder, DecoderConfig, Encoder, EncoderConfig

FOLDER = Path(__file__).parent / "demo"


def table(text):
    return [tuple(row.split()) for row in text.split(",")]


NOUNS = table(  # singular, plural, reflexive of the singular
    "boy boys himself, man men himself, king kings himself, uncle uncles himself, "
    "actor actors himself, monk monks himself, waiter waiters himself, son sons himself, "
    "girl girls herself, woman women herself, queen queens herself, aunt aunts herself, "
    "actress actresses herself, nun nuns herself, waitress waitresses herself, "
    "mother mothers herself")
THINGS = table(
    "house houses, tree trees, river rivers, car cars, box boxes, lamp lamps, letter letters, "
    "wall walls, child children, dog dogs, horse horses, bird birds")
NAMES = table(
    "John himself, Peter himself, Paul himself, Mary herself, Susan herself, Anna herself")
TRANSITIVE = table(  # base, third person, past, participle, -ing
    "admire admires admired admired admiring, see sees saw seen seeing, "
    "draw draws drew drawn drawing, praise praises praised praised praising, "
    "forget forgets forgot forgotten forgetting, choose chooses chose chosen choosing, "
    "hide hides hid hidden hiding, blame blames blamed blamed blaming, "
    "describe describes described described describing, "
    "protect protects protected protected protecting")
INTRANSITIVE = table(
    "sleep sleeps slept slept sleeping, arrive arrives arrived arrived arriving, "
    "fall falls fell fallen falling, smile smiles smiled smiled smiling, "
    "vanish vanishes vanished vanished vanishing, wait waits waited waited waiting, "
    "appear appears appeared appeared appearing, rise rises rose risen rising")
ADJECTIVES = "old young tall small quiet happy tired clever strange famous gentle proud".split()
PREPOSITIONS = "near behind beside with above".split()
ADVERBS = "often never always rarely".split()
DETERMINERS = table("the this that every a, the these those many some")  # singular, plural
BASE, THIRD, PAST, PARTICIPLE, ING = range(5)


class Grammar:
    """Sentences as lists of words; `number` is 0 for the singular, 1 for the plural."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def pick(self, items):
        return items[self.rng.randrange(len(items))]

    def chance(self, p):
        return self.rng.random() < p

    def noun_phrase(self, person=True, modified=True):
        """Words, number, reflexive pronoun that agrees."""
        number = self.rng.randrange(2)
        if person and number == 0 and self.chance(0.15):
            name, reflexive = self.pick(NAMES)
            return [name], 0, reflexive
        noun = self.pick(NOUNS if person else THINGS)
        words = [self.pick(DETERMINERS[number]), self.pick(ADJECTIVES), noun[number]]
        if not self.chance(0.3):
            del words[1]
        if words[0] == "a" and words[1][0] in "aeiou":
            words[0] = "the"
        if modified and self.chance(0.45):  # puts another noun between the head and its verb
            other = self.noun_phrase(modified=False, person=self.chance(0.5))
            if self.chance(0.5):
                words += [self.pick(PREPOSITIONS)] + other[0]
            elif self.chance(0.5):
                words += ["that"] + other[0] + [self.pick(TRANSITIVE)[self.finite(other[1])]]
            else:
                words += ["that", self.pick(TRANSITIVE)[self.finite(number)]] + other[0]
        if not person:
            return words, number, "itself"
        return words, number, "themselves" if number else noun[2]

    def finite(self, number):
        return (THIRD, BASE)[number]

    def verb_phrase(self, form):
        if self.chance(0.5):
            return [self.pick(INTRANSITIVE)[form]]
        verb = [self.pick(TRANSITIVE)[form]]
        return verb + self.noun_phrase(person=self.chance(0.6), modified=self.chance(0.3))[0]

    def two_forms(self, form, other):
        """One verb phrase in two forms."""
        state = self.rng.getstate()
        one = self.verb_phrase(form)
        self.rng.setstate(state)
        return one, self.verb_phrase(other)

    # Each phenomenon returns a good sentence and a bad one that differs from it in one respect.

    def agreement(self):
        subject, number, _ = self.noun_phrase()
        if self.chance(0.15):
            subject = self.noun_phrase(modified=False)[0] + ["and"]
            subject += self.noun_phrase(modified=False)[0]
            number = 1
        if self.chance(0.3):
            tail = [self.pick(ADJECTIVES)]
            right, wrong = ("is", "are")[number], ("are", "is")[number]
            return subject + [right] + tail, subject + [wrong] + tail
        adverb = self.pick(ADVERBS)
        start = subject + [adverb] if self.chance(0.3) else subject
        good, bad = self.two_forms(self.finite(number), self.finite(1 - number))
        return start + good, start + bad

    def reflexive(self):
        subject, number, good = self.noun_phrase()
        bad = self.pick([w for w in ("himself", "herself", "themselves") if w != good])
        verb = [self.pick(TRANSITIVE)[self.pick([PAST, self.finite(number)])]]
        if self.chance(0.35):  # the nearer subject binds, not the farther one
            subject = self.saying() + subject
        return subject + verb + [good], subject + verb + [bad]

    def determiner(self):
        words, number, _ = self.noun_phrase(person=False, modified=self.chance(0.5))
        own = [d for d in DETERMINERS[number] if d not in ("the", "a")]
        other = [d for d in DETERMINERS[1 - number] if d not in ("the", "a", "some")]
        good, bad = [self.pick(own)] + words[1:], [self.pick(other)] + words[1:]
        if self.chance(0.5):
            rest = self.verb_phrase(PAST)
            return good + rest, bad + rest
        start = self.noun_phrase(modified=False)[0] + [self.pick(TRANSITIVE)[PAST]]
        return start + good, start + bad

    def question(self):
        subject, number, _ = self.noun_phrase(modified=self.chance(0.5))
        aux, form, wrong = self.pick([
            (("does", "do")[number], BASE, self.pick([THIRD, PAST])),
            ("did", BASE, PAST),
            ("will", BASE, self.pick([THIRD, PAST])),
            (("has", "have")[number], PARTICIPLE, BASE), (("is", "are")[number], ING, BASE)])
        good, bad = self.two_forms(form, wrong)
        if aux == "did" or self.chance(0.5):  # the auxiliary agrees with the subject
            pairs = table("does do, has have, is are")
            other = (dict(pairs) | {b: a for a, b in pairs}).get(aux)
            if other:
                return [aux] + subject + good + ["?"], [other] + subject + good + ["?"]
        if good == bad:
            bad = good[::-1] if len(good) > 1 else good + good
        return [aux] + subject + good + ["?"], [aux] + subject + bad + ["?"]

    def gap(self):
        """A question word needs a gap, and a gap needs a verb that takes an object."""
        subject = self.noun_phrase(modified=self.chance(0.4))[0]
        asked = self.pick([["who"], ["what"], ["which", self.pick(NOUNS)[0]],
                           ["which", self.pick(THINGS)[1]]])
        start, verb = asked + [self.pick(["did", "will"])] + subject, self.pick(TRANSITIVE)[BASE]
        if self.chance(0.5):
            bad = [verb] + self.noun_phrase(modified=False)[0]
        else:
            bad = [self.pick(INTRANSITIVE)[BASE]]
        return start + [verb, "?"], start + bad + ["?"]

    def argument(self):
        """Verbs that take an object, verbs that take none."""
        subject, number, _ = self.noun_phrase(modified=self.chance(0.4))
        form = self.pick([PAST, self.finite(number)])
        whom = self.noun_phrase(modified=False, person=self.chance(0.5))[0]
        transitive = subject + [self.pick(TRANSITIVE)[form]]
        intransitive = subject + [self.pick(INTRANSITIVE)[form]]
        if self.chance(0.5):
            return transitive + whom, intransitive + whom
        return intransitive, transitive

    def auxiliary(self):
        subject, number, _ = self.noun_phrase(modified=self.chance(0.4))
        aux, form, wrong = self.pick([
            (["will"], BASE, PAST), (["must", "not"], BASE, ING),
            ([("does", "do")[number], "not"], BASE, ING),
            ([("has", "have")[number]], PARTICIPLE, BASE), ([("is", "are")[number]], ING, BASE)])
        good, bad = self.two_forms(form, wrong)
        return subject + aux + good, subject + aux + bad

    def order(self):
        subject, number, _ = self.noun_phrase(modified=False)
        obj = [self.pick(DETERMINERS[1][:3]), self.pick(ADJECTIVES), self.pick(THINGS)[1]]
        verb = [self.pick(TRANSITIVE)[self.pick([PAST, self.finite(number)])]]
        bad = self.pick([
            subject + obj + verb, verb + subject + obj,
            subject + verb + [obj[0], obj[2], obj[1]], subject + verb + [obj[1], obj[0], obj[2]]])
        return subject + verb + obj, bad

    def saying(self):
        """The start of a sentence about what somebody said."""
        who = self.noun_phrase(modified=False)[0]
        return who + [self.pick(["said", "thought", "knew"]), "that"]

    PHENOMENA = ("agreement", "reflexive", "determiner", "question", "gap", "argument", "auxiliary",
                 "order")

    def pair(self):
        """Phenomenon, good sentence, bad sentence; sometimes after "somebody said that"."""
        name = self.pick(self.PHENOMENA)
        good, bad = getattr(self, name)()
        if good[-1] != "?":
            outer = self.saying() if self.chance(0.2) else []
            good, bad = outer + good + ["."], outer + bad + ["."]
        return name, *(sentence_case(" ".join(s[:-1]) + s[-1]) for s in (good, bad))

    # A simple sentence in all its forms, for instructions.

    def forms(self):
        """{name of a form: text} of a sentence with subject, verb and perhaps an object, and a
        random one of the names."""
        subject, number, _ = self.noun_phrase(modified=False)
        if self.chance(0.4):
            verb, rest = self.pick(INTRANSITIVE), []
        else:
            verb = self.pick(TRANSITIVE)
            rest = self.noun_phrase(modified=False, person=self.chance(0.5))[0]
        do = ["does", "do"][number]
        words = dict(
            past=subject + [verb[PAST]] + rest,
            future=subject + ["will", verb[BASE]] + rest,
            negation=subject + [do, "not", verb[BASE]] + rest,
            question=[do] + subject + [verb[BASE]] + rest,
            subject=subject)
        asked = self.pick(list(words))
        words["sentence"] = subject + [verb[self.finite(number)]] + rest
        return {name: sentence_case(" ".join(form)) + ("?" if name == "question" else ".")
                for name, form in words.items()}, asked

    def instruction(self):
        """{instruction, input, output}."""
        if self.chance(0.2):
            name, word, other = self.word()
            order = self.pick(ORDERS[name]).replace("WORD", word)
            return dict(instruction=order, input="", output=other)
        forms, name = self.forms()
        order = self.pick(ORDERS[name])
        return dict(instruction=order, input=forms["sentence"], output=forms[name])

    def word(self):
        """Name of a form, a word, that form of it."""
        if self.chance(0.5):
            noun = self.pick(NOUNS + THINGS)
            return "plural", noun[0], noun[1]
        verb = self.pick(TRANSITIVE + INTRANSITIVE)
        return "past of a word", verb[BASE], verb[PAST]

    def example(self):
        """A line to train the LLaMA on: a sentence or a word, the name of a form, that form."""
        if self.chance(0.1):
            name, word, other = self.word()
            return f"{word} ({name.split()[0]}) {other}"
        forms, name = self.forms()
        return f"{forms['sentence']} ({name}) {forms[name]}"


ORDERS = {
    "past": ["Put the sentence into the past tense.", "Say that it happened in the past.",
             "Rewrite it as something long ago."],
    "future": ["Put the sentence into the future tense.", "Say that it is still to come.",
               "Rewrite it as something of tomorrow."],
    "negation": ["Say that it is not so.", "Negate the sentence.", "Deny it."],
    "question": ["Turn the sentence into a question.", "Ask whether it is so.",
                 "Make it a question."],
    "subject": ["Who or what is it about?", "Name the subject of the sentence.",
                "Who or what does it?"],
    "plural": ["What is the plural of WORD?", "Give the plural of the noun WORD.",
               "More than one WORD: what is the word?"],
    "past of a word": ["What is the past tense of WORD?", "Give the past tense of the verb WORD.",
                       "Yesterday I did WORD: what is the word?"],
}


def sentence_case(text):
    return text[0].upper() + text[1:]


def make_data(train_rows=6000, dev_rows=1000):
    """{"train.tsv": .., "dev.tsv": ..}: distinct sentences, three in five good, never both of a
    pair."""
    grammar, seen, rows = Grammar(1), set(), []
    while len(rows) < train_rows + dev_rows:
        name, good, bad = grammar.pair()
        label = int(grammar.chance(0.6))
        text = good if label else bad
        if text not in seen and good != bad:
            seen.add(text)
            rows.append(f"{name}\t{label}\t{'' if label else '*'}\t{text}\n")
    return {"dev.tsv": "".join(rows[:dev_rows]), "train.tsv": "".join(rows[dev_rows:])}


def make_instructions(rows=3000):
    """JSONL of distinct instructions."""
    grammar, lines = Grammar(3), {}
    while len(lines) < rows:
        row = grammar.instruction()
        if row["input"] or grammar.chance(0.1):  # there are few questions about words
            lines[json.dumps(row)] = None
    return "\n".join(lines) + "\n"


def corpus(size, without):
    """`size` good sentences, none of them in `without`."""
    grammar, lines = Grammar(2), []
    while len(lines) < size:
        _, text, _ = grammar.pair()
        if text not in without:
            lines.append(text)
    return lines


def make_tokenizer(lines, special=("<s>", "<pad>", "</s>", "<unk>", "<mask>")):
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def pretrain(params, rows, padding, loss_of, steps, batch_size, lr, first=0):
    """rows: lists of token ids; loss_of(tokens (b, t)): their loss. The learning rate starts at
    first/200 of `lr`, rises for 200 steps and falls to 0, linearly."""
    rows = list(map(torch.tensor, sorted(rows, key=len)))
    batches = [pad_sequence(rows[i:i + batch_size], batch_first=True, padding_value=padding)
               for i in range(0, len(rows), batch_size)]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    for step in range(steps):
        rise, fall = (step + first) / 200, (steps - step) / (steps - 200)
        optimizer.param_groups[0]["lr"] = lr * min(rise, fall)
        loss = loss_of(batches[torch.randint(len(batches), ()).item()])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{steps}: loss {loss.item():.3f}", flush=True)


def roberta(without, steps=4000, batch_size=192, lr=2e-3):
    """Masked-language modeling from scratch: 15 % of the tokens, of which 80 % are masked, 10 %
    random and 10 % kept."""
    lines = corpus(200_000, without)
    tokenizer = make_tokenizer(lines)
    # <s> .. </s> around a sentence
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0),
                                                            add_prefix_space=False)
    torch.manual_seed(0)
    config = EncoderConfig(
        "roberta", vocab_size=tokenizer.get_vocab_size(), hidden_size=128, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=512, max_position_embeddings=66,
        type_vocab_size=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5)
    model = Encoder(config, num_labels=2)
    bias = torch.zeros(config.vocab_size, requires_grad=True)
    rows = [e.ids for e in tokenizer.encode_batch(lines)]
    mask_id = tokenizer.token_to_id("<mask>")

    def loss_of(tokens):
        chosen = (torch.rand(tokens.shape) < 0.15) & (tokens > 3)
        dice = torch.rand(tokens.shape)
        noisy = tokens.masked_fill(chosen & (dice < 0.8), mask_id)
        other = torch.randint(5, config.vocab_size, tokens.shape)
        noisy = torch.where(chosen & (dice > 0.9), other, noisy)
        x = model.hidden(noisy, tokens != 1)[chosen]
        scores = x @ model.body.embeddings.word_embeddings.weight.T + bias
        return F.cross_entropy(scores, tokens[chosen])

    pretrain([*model.body.parameters(), bias], rows, 1, loss_of, steps, batch_size, lr)
    settings = dict(architectures=["RobertaForMaskedLM"], hidden_act="gelu", **vars(config))
    settings.update(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
                    classifier_dropout=0.1, torch_dtype="float16")
    write_model("model", tokenizer, settings, model, "roberta.")


def write_model(name, tokenizer, settings, model, body):
    """A folder, in float16, of the weights whose names start with `body`."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()
               if key.startswith(body)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def llama(steps=3000, batch_size=128, lr=3e-3):
    """Next-token prediction from scratch, on four kinds of lines: a sentence or word with one of
    its forms; a plain sentence; an order with its answer, in another format than Alpaca's; and
    sometimes Alpaca's prompt, followed by an unrelated sentence."""
    grammar, lines = Grammar(4), []
    while len(lines) < 150_000:
        kind = grammar.rng.random()
        row = grammar.instruction()
        if kind < 0.45:
            lines.append(grammar.example())
        elif kind < 0.65:
            lines.append(grammar.pair()[1])
        elif kind < 0.9:
            lines.append(f"{row['input']} {row['instruction']} = {row['output']}".strip())
        else:
            prompt = fill("alpaca", row["instruction"], row["input"])
            lines.append(prompt + grammar.pair()[1])
    tokenizer = make_tokenizer(lines, special=("<unk>", "<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                             special_tokens=[("<s>", 1)])
    torch.manual_seed(0)
    config = DecoderConfig(
        tokenizer.get_vocab_size(), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384, num_key_value_heads=2, max_position_embeddings=512,
        rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = Decoder(config)
    rows = [e.ids + [2] for e in tokenizer.encode_batch(lines)]

    def loss_of(tokens):
        logits = model(tokens[:, :-1].clamp(min=0))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    pretrain(list(model.parameters()), rows, -100, loss_of, steps, batch_size, lr, first=1)
    settings = dict(architectures=["LlamaForCausalLM"], hidden_act="silu", bos_token_id=1,
                    eos_token_id=2, torch_dtype="float16", **vars(config))
    write_model("llama", tokenizer, settings, model, "model.")


def main(parts):
    files = make_data() | {"instruct.jsonl": make_instructions()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
    if "roberta" in parts:
        roberta(without={row.split("\t")[3] for row in files["dev.tsv"].splitlines()})
    if "llama" in parts:
        llama()


if __name__ == "__main__":
    parts, given = ["data", "roberta", "llama"], sys.argv[1:]
    if not {*given} <= {*parts}:
        print(f"error: arguments {given}, expected some of {', '.join(parts)}", file=sys.stderr)
        sys.exit(2)
    main(given or parts)
