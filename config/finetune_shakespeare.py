# Fine-tune GPT-2 XL on Shakespeare.
#
#   python data/custom/prepare.py --input=input.txt --name=shakespeare --tokenizer=gpt2
#   python train.py config/finetune_shakespeare.py
#
# Needs a network for GPT-2's weights and vocabulary, `pip install transformers`, and a GPU of 40 GB; with
# --init_from=gpt2 8 GB do. The trunk starts from OpenAI's weights; a DAG (--dag_depth=4) would start fresh.

init_from = "gpt2-xl"
dataset = "shakespeare"

dag_depth = 0
block_size = 1024
# 1 row x 32 micro-batches x 1024 tokens = 32,768 tokens a step; Shakespeare has 301,966, an epoch is 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
schedule = "constant"
warmup_iters = 0

eval_interval = 5
eval_iters = 40
