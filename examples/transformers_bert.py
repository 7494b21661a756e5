"""transformers' BERT with a new classification head; the adapter is saved for PEFT.

    PYTHONPATH=. python examples/transformers_bert.py    # adapter.py needs the whole project
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

import adapter
from salora import SaLoRA, rank_map, ranks

torch.manual_seed(0)
config = BertConfig(
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
)
model = BertForSequenceClassification(config)  # in your case: .from_pretrained(..)
model.train()
targets = [
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
steps = 200
salora = SaLoRA(model, targets, steps=steps, r=8, budget=0.5)
model.classifier.requires_grad_(True)  # before param_groups()
optimizer = torch.optim.AdamW(salora.param_groups(lr=3e-3))

labels = torch.randint(2, (64,))
ids = torch.randint(50, (64, 12)) + 50 * labels.unsqueeze(1)  # low numbers or high ones
for step in range(steps):
    salora.begin_step()
    loss = model(input_ids=ids, labels=labels).loss + salora.penalty()
    loss.backward()
    optimizer.step()
    salora.end_step(optimizer)
    optimizer.zero_grad()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")

print(rank_map(ranks(model), r=8))
adapter.save(model, "adapter", ["classifier"], budget=salora.budget, task_type="SEQ_CLS")
print("adapter/: written for PEFT")
