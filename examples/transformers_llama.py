"""transformers' LLaMA; the adapter is saved for PEFT.

    PYTHONPATH=. python examples/transformers_llama.py    # adapter.py needs the whole project
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adapter
from salora import SaLoRA, rank_map, ranks

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    initializer_range=0.2,  # a random head as strong as a trained one
)
model = LlamaForCausalLM(config)  # in your case: .from_pretrained(..)
model.train()
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
steps = 300
salora = SaLoRA(model, targets, steps=steps, r=8, budget=0.5)
optimizer = torch.optim.AdamW(salora.param_groups(lr=3e-3))

ids = (torch.randint(100, (16, 1)) + torch.arange(12)) % 100  # counting
for step in range(steps):
    salora.begin_step()
    loss = model(input_ids=ids, labels=ids).loss + salora.penalty()
    loss.backward()
    optimizer.step()
    salora.end_step(optimizer)
    optimizer.zero_grad()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")

print(rank_map(ranks(model), r=8))
adapter.save(model, "adapter", budget=salora.budget, task_type="CAUSAL_LM")
print("adapter/: written for PEFT")
