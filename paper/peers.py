"""
Other people's code on the same task, for bench.py to compare with. SaLoRA does not need it. It runs
in an environment of its own (pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate
datasets), whose python goes to `paper/bench.py loop --peers`.

    python paper/peers.py trainer|grouped|adalora|floor --model DIR --data DIR    # prints JSON

One epoch of CoLA, batch 32, truncation 128, float32, r 8 on the six matrices of each layer:
    trainer    transformers' Trainer with PEFT's LoRA
    grouped    the same with its sampler that groups rows of like length
    adalora    trainer with PEFT's AdaLoRA, 8 to 4: the size of SaLoRA at b = 0.5
    floor      nothing is trained: forward and input-gradient backward of the frozen model on
               batches sorted by length, which every adapter method needs
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

parser = argparse.ArgumentParser()
parser.add_argument("system", choices=["trainer", "grouped", "adalora", "floor"])
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)

lines = (Path(args.data) / "CoLA" / "train.tsv").read_text(encoding="utf-8").splitlines()
tokenizer = AutoTokenizer.from_pretrained(args.model)
rows = [dict(tokenizer(text, truncation=True, max_length=128), labels=int(label))
        for _, label, _, text in (line.split("\t") for line in lines)]
model = AutoModelForSequenceClassification.from_pretrained(
    args.model, num_labels=2, dtype=torch.float32)
collate = DataCollatorWithPadding(tokenizer)


class Clock(TrainerCallback):
    """Times the loop, from the first step to the end of the last."""
    start = None

    def on_step_begin(self, *_, **__):
        self.start = self.start or time.perf_counter()

    def on_optimizer_step(self, _, state, __, **___):
        if args.system == "adalora":  # PEFT requires it before zero_grad()
            model.base_model.update_and_allocate(state.global_step)

    def on_step_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.start


if args.system == "floor":
    model.requires_grad_(False)
    model.train()
    rows.sort(key=lambda row: len(row["input_ids"]))
    batches = [rows[i:i + 32] for i in range(0, len(rows), 32)]
    random.Random(0).shuffle(batches)
    start = time.perf_counter()
    for batch in batches:
        batch = collate(batch)
        embeddings = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_(True)
        model(inputs_embeds=embeddings, **batch).loss.backward()
    seconds = time.perf_counter() - start
else:
    modules = dict(
        r=8, lora_alpha=8, lora_dropout=0.0, task_type="SEQ_CLS",
        modules_to_save=["classifier", "pooler"],
        target_modules=r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|"
                       r"(attention\.)?output\.dense|intermediate\.dense)")
    config = LoraConfig(**modules)
    if args.system == "adalora":
        steps = -(-len(rows) // 32)
        config = AdaLoraConfig(
            init_r=8, target_r=4, tinit=steps // 5, tfinal=steps // 2, total_step=steps,
            orth_reg_weight=0.1, **modules)
    model, clock = get_peft_model(model, config), Clock()
    adapted = [name for name, p in model.named_parameters() if "lora_A" in name and p.requires_grad]
    assert len(adapted) == 6 * model.config.num_hidden_layers
    trainer = Trainer(
        model=model, train_dataset=rows, data_collator=collate, callbacks=[clock],
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=32,
            learning_rate=1e-3, warmup_steps=0.06,
            train_sampling_strategy="group_by_length" if args.system == "grouped" else "random",
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, dataloader_pin_memory=False))
    trainer.train()
    seconds = clock.seconds

print(json.dumps(dict(examples=len(rows) / seconds, seconds=seconds,
                      mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))
