"""TEXT -> TOKENS -> BATCH. Reading order: tokenizer, sources, corpus, encode, order, structure, tokenfile, tokenwriter, batches."""
