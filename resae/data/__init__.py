"""Text → rows of token ids → shuffled activations of several hook points from one forward pass.

texts        hub name, local folder or file, or `embedded` → texts
rows         texts → rows `[T]`: BOS, then T−1 tokens of the documents joined by EOS
activations  rows → L activations of each row, by running the model
batches      those → batches of L activations `[N, D]`, shuffled in a bounded buffer
cache        activations on disk, read in place of running the model again
text_record  hashes of the text that a run was trained on
"""
