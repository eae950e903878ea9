# The demo of a real model, SmolLM2-135M-Instruct: answers, and a story as it is written.
# scripts/real_model.sh fetches it.

folder = Path.expand("../.toolchain/models/smollm2", __DIR__)
title = fn text -> IO.puts(IO.ANSI.format([:bright, text])) end

model = Bombus.load_model!(folder)
tokenizer = Bombus.load_tokenizer!(folder)
serving = Bombus.Serving.new(model, tokenizer, max_new_tokens: 200)

IO.puts("""

A #{model.spec.family} of #{model.spec.layers} layers, #{model.quantization.bits}-bit, \
on the #{String.upcase(to_string(model.device))}.
""")

questions = [
  "What is the capital of France?",
  "How many legs does a spider have?",
  "Name three colours."
]

# All in one batch.
for {question, answer} <- Enum.zip(questions, Bombus.Serving.run(serving, questions)) do
  title.(question)
  IO.puts("#{hd(answer.results).text}\n")
end

story = "Write a long story about a lighthouse keeper and a lost ship."
title.("#{story} (temperature 0.7)")
input = %{text: story, temperature: 0.7, top_p: 0.95, seed: 1}
serving |> Bombus.Serving.stream(input) |> Enum.each(&IO.write/1)
IO.puts("\n")

IO.puts("""
Next, in iex (`. .toolchain/env && iex -S mix`):

    model = Bombus.load_model!(".toolchain/models/smollm2")
    tokenizer = Bombus.load_tokenizer!(".toolchain/models/smollm2")
    serving = Bombus.Serving.new(model, tokenizer, max_new_tokens: 200)
    Bombus.Serving.run(serving, "What is the capital of Italy?")
""")
