Step<TILES, HIDDEN, INNER, HEADS, KV_HEADS, DIM, LAYERS, VOCAB, EPS_BITS, THETA_BITS> step;
step.table = reinterpret_cast<const word*>(table);
step.plan = reinterpret_cast<const word*>(plan);
step.sampled = sampled;
step.logits = logits;
step.workspace = reinterpret_cast<unsigned char*>(const_cast<unsigned*>(workspace));
step.begin();
step.run();
