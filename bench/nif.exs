# What the BEAM adds to the engine's decode: the same tokens through Bombus.Serving, beside the Rust
# benchmark's own figure, in turn.
#
#     mix run bench/nif.exs            # after `make bench` has made the checkpoint and the program

root = Path.expand("..", __DIR__)
bench = Path.join(root, "native/target/release/examples/bench")
folder = Path.join(System.tmp_dir!(), "bombus-bench/qwen3-0.6b-4bit-bf16")
tokens = 64
rounds = 5

for path <- [bench, folder], not File.exists?(path) do
  Mix.raise("#{path} is missing: run `make bench` first")
end

model = Bombus.load_model!(folder, device: :cpu)
serving = Bombus.Serving.new(model, nil, max_new_tokens: tokens + 1)
prompt = for place <- 0..7, do: rem(place * 7919 + 11, 2000)

# Tokens a second from the first to the last, as they come to the caller.
through_the_beam = fn ->
  [{first, _} | rest] =
    serving
    |> Bombus.Serving.stream(%{token_ids: prompt})
    |> Stream.flat_map(&List.wrap/1)
    |> Enum.map(&{System.monotonic_time(:microsecond), &1})

  {last, _} = List.last(rest)
  length(rest) * 1.0e6 / (last - first)
end

in_rust = fn ->
  json = Path.join(System.tmp_dir!(), "bombus-nif-bench.json")
  arguments = ~w(--repeat 1 --prompt 8 --depth 0 --batch 1 --tokens #{tokens} --json #{json})
  {_output, 0} = System.cmd(bench, arguments, stderr_to_stdout: true)
  %{"tokens_per_second" => figures} = json |> File.read!() |> JSON.decode!()
  Enum.find(figures, &(&1["what"] == "decode at 0"))["median"]
end

through_the_beam.()
pairs = for _round <- 1..rounds, do: {in_rust.(), through_the_beam.()}
median = fn list -> list |> Enum.sort() |> Enum.at(div(length(list), 2)) end

for {rust, beam} <- pairs do
  IO.puts("Rust #{Float.round(rust, 1)} tokens/s, through the BEAM #{Float.round(beam, 1)}")
end

ratio = median.(for {rust, beam} <- pairs, do: beam / rust)
IO.puts("the BEAM's share of the time, median of the ratios: #{Float.round((1 / ratio - 1) * 100, 1)} %")
