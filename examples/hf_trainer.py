"""transformers' Trainer: with gradient accumulation, and with evaluation while it trains.

Copy SaLoRATrainer. This also runs as it is under torchrun.

    PYTHONPATH=. python examples/hf_trainer.py            # adapter.py needs the whole project
    PYTHONPATH=. python examples/hf_trainer.py FOLDER     # resumes from its checkpoint, if any
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import adapter
from salora import SaLoRA, average_gradients, rank_map, ranks


class SaLoRACallback(TrainerCallback):
    def __init__(self, salora):
        self.salora = salora

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        average_gradients(optimizer)  # for several processes

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.salora.end_step(optimizer)
        optimizer.zero_grad()  # Trainer calls model.zero_grad(), and log theta is not in the model

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.salora.state_dict(), folder / "salora.pt")


class SaLoRATrainer(Trainer):
    loss_is_scaled_for_ga = False  # Trainer divides each loss by the number of accumulated batches

    def __init__(self, *args, salora, **kwargs):
        super().__init__(*args, **kwargs)
        self.salora = salora
        self.add_callback(SaLoRACallback(salora))

    def _load_from_checkpoint(self, folder, model=None):
        super()._load_from_checkpoint(folder, model)
        state = torch.load(Path(folder) / "salora.pt", weights_only=True)
        self.salora.load_state_dict(state)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Trainer calls this for every batch, right after model.train(); in evaluation, too
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        self.salora.begin_step()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss + self.salora.penalty()  # divided like the losses: it counts once a step
        return (loss, outputs) if return_outputs else loss


class LowOrHigh(Dataset):
    """Label 0: low tokens; label 1: high ones."""

    def __init__(self, rows):
        self.labels = torch.randint(2, (rows,))
        self.ids = torch.randint(50, (rows, 12)) + 50 * self.labels.unsqueeze(1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return dict(input_ids=self.ids[i], labels=self.labels[i])


torch.manual_seed(0)
folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
steps = 200
args = TrainingArguments(
    output_dir=folder,
    max_steps=steps,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=128,
    gradient_accumulation_steps=2,
    eval_strategy="steps",
    eval_steps=15,  # in the window, too
    logging_steps=20,
    save_steps=80,  # before the window and after it
    report_to="none",
    disable_tqdm=True,
    ddp_find_unused_parameters=True,  # under torchrun: the cut resizes tensors
)
config = BertConfig(
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
)
model = BertForSequenceClassification(config)  # in your case: .from_pretrained(..)
model.to(args.device)  # before SaLoRA, which puts its gates there
targets = [
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
salora = SaLoRA(model, targets, steps=steps, r=8, budget=0.5)
model.classifier.requires_grad_(True)  # before param_groups()
optimizer = torch.optim.AdamW(salora.param_groups(lr=3e-3))
trainer = SaLoRATrainer(
    model=model,
    args=args,
    train_dataset=LowOrHigh(512),
    eval_dataset=LowOrHigh(128),
    optimizers=(optimizer, None),  # None: Trainer's own schedule
    salora=salora,
)
trainer.remove_callback(PrinterCallback)  # the losses are printed below
trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))

if trainer.is_world_process_zero():
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            print(f"step {entry['step']}: loss {entry['eval_loss']:.4f}")
    print(rank_map(ranks(model), r=8))
    adapter.save(model, "adapter", ["classifier"], budget=salora.budget, task_type="SEQ_CLS")
    print("adapter/: written for PEFT")
