import torch
from transformers import BertConfig, BertForSequenceClassification
from salora import SaLoRA, save

config = BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
model = BertForSequenceClassification(config)  # or from_pretrained(..)
salora = SaLoRA(model, targets=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"], r=8, budget=0.5)
model.classifier.requires_grad_(True)
optimizer = torch.optim.AdamW(salora.param_groups(lr=3e-3, gate_lr=0.5))
ids, labels = torch.randint(100, (32, 12)), torch.randint(2, (32,))
for step in range(200):
    salora.begin_step(step / 200, optimizer)
    loss = model(input_ids=ids, labels=labels).loss
    (loss + salora.penalty()).backward()
    optimizer.step(), salora.end_step(), optimizer.zero_grad(), print("loss", loss.item())
save(model, "adapter", ["classifier"], task_type="SEQ_CLS")
