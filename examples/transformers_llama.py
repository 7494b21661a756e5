import torch
from transformers import LlamaConfig, LlamaForCausalLM
from salora import SaLoRA, save

config = LlamaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     intermediate_size=128)
model = LlamaForCausalLM(config)  # or from_pretrained(..)
salora = SaLoRA(model, targets=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], r=8, budget=0.5)
optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2, gate_lr=0.5))
ids = torch.randint(100, (4, 12))
for step in range(200):
    salora.begin_step(step / 200, optimizer)
    loss = model(input_ids=ids, labels=ids).loss
    (loss + salora.penalty()).backward()
    optimizer.step(), salora.end_step(), optimizer.zero_grad(), print("loss", loss.item())
save(model, "adapter", task_type="CAUSAL_LM")
