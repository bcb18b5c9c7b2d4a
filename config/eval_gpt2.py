# The validation loss of OpenAI's GPT-2 124M on OpenWebText, without training.
#
#   python train.py config/eval_gpt2.py
#
# Needs data/openwebtext, a network for the weights and `pip install transformers`; minutes on a GPU.
# nanoGPT's README reports 3.11 to 3.12 with GPT-2's own tokens; here digits are single tokens, so the
# number of tokens and the loss differ slightly.

init_from = "gpt2"
eval_only = True
dataset = "openwebtext"

dag_depth = 0
batch_size = 8
block_size = 1024
eval_iters = 500
