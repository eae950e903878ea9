# The demo: the model that ships with Bombus, without an adapter and with each of its own.

write = fn serving, input ->
  serving |> Bombus.Serving.stream(input) |> Enum.each(&IO.write/1)
  IO.puts("\n")
end

title = fn text -> IO.puts(IO.ANSI.format([:bright, text])) end

model = Bombus.load_model!(:demo)
tokenizer = Bombus.load_tokenizer!(:demo)
serving = Bombus.Serving.new(model, tokenizer, max_new_tokens: 100)

IO.puts("""

A #{model.spec.family} of #{model.spec.layers} layers, #{model.quantization.bits}-bit, \
on the #{String.upcase(to_string(model.device))}.
""")

for topic <- ["coffee", "hiking"] do
  prompt = "Write a post about #{topic}"
  title.("#{prompt}")
  write.(serving, prompt)

  for name <- Enum.sort(File.ls!(Application.app_dir(:bombus, "priv/models/adapters"))) do
    title.("#{prompt} (adapter: #{name})")
    write.(serving, %{text: prompt, adapter: Bombus.load_adapter!({:demo, name})})
  end

  title.("#{prompt} (temperature 0.8)")
  write.(serving, %{text: prompt, temperature: 0.8})
end

IO.puts("""
Next, in iex (`. .toolchain/env && iex -S mix`):

    model = Bombus.load_model!(:demo)
    tokenizer = Bombus.load_tokenizer!(:demo)
    serving = Bombus.Serving.new(model, tokenizer, max_new_tokens: 100)
    Bombus.Serving.run(serving, "Write a post about the sea")
""")
