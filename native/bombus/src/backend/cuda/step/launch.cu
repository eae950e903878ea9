begin(reinterpret_cast<const word*>(table), reinterpret_cast<const word*>(plan), sampled, logits,
      reinterpret_cast<unsigned char*>(const_cast<unsigned*>(workspace)));
run();
