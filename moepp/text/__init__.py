"""The way of a text, from wherever it lies to the batches that a model trains on; a file for each step.

documents.py     a file, a folder, a corpus list (corpus_list.py) or a data set of the Hub → documents
tokenizer.py     documents → a tokenizer; text ↔ tokens, and the bytes of each
prepare.py       documents and tokenizer → a folder of token files, made once
token_files.py   that folder, opened and checked
batches.py       tokens → windows → training batch n, and batches of the held-out text
data_module.py   all of this as Lightning wants it (held_out.py: as windows to look at, of any text)
"""
