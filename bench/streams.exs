# Many callers at once, through the BEAM: tokens a second together, the time to the first token, and
# the gaps between tokens, as the callers see them. Beside llama.cpp's batch where it is named.
#
#     make bench ARGS="--repeat 1"     # makes the checkpoint
#     mix run bench/streams.exs [--streams 1,4,16,64] [--tokens 64] [--rounds 3]
#                               [--llama-cpp LLAMA_CPP/build/bin --gguf /tmp/q06.gguf]

defmodule Streams do
  def run(arguments) do
    switches = [
      streams: :string,
      tokens: :integer,
      rounds: :integer,
      llama_cpp: :string,
      gguf: :string
    ]

    {options, []} = OptionParser.parse!(arguments, strict: switches)
    folder = Path.join(System.tmp_dir!(), "bombus-bench/qwen3-0.6b-4bit-bf16")
    File.exists?(folder) || Mix.raise("#{folder} is missing: run `make bench` first")
    tokens = Keyword.get(options, :tokens, 64)

    counts =
      options
      |> Keyword.get(:streams, "1,4,16,64")
      |> String.split(",")
      |> Enum.map(&String.to_integer/1)

    model = Bombus.load_model!(folder, device: :cpu, max_batch_size: 64, prefix_cache: 0)
    serving = Bombus.Serving.new(model, nil, max_new_tokens: tokens)
    Bombus.Serving.run(serving, input(0, 8))

    rounds =
      for _round <- 1..Keyword.get(options, :rounds, 3), count <- counts do
        {count, together(serving, count), llama_cpp(options, count, tokens)}
      end

    IO.puts(
      "| streams | tokens/s | first token ms p50, p99 | gap ms p50, p99 | llama.cpp tokens/s |"
    )

    IO.puts("| --- | --- | --- | --- | --- |")
    for count <- counts, do: row(count, for({^count, own, peer} <- rounds, do: {own, peer}))
  end

  defp input(seed, length) do
    %{token_ids: for(place <- 0..(length - 1), do: rem(place * 7919 + seed * 104_729 + 11, 2000))}
  end

  # All ask at once; each notes when its tokens come.
  defp together(serving, count) do
    start = now()

    times =
      1..count
      |> Enum.map(
        &Task.async(fn ->
          Enum.map(Bombus.Serving.stream(serving, input(&1, 8)), fn _id -> now() end)
        end)
      )
      |> Task.await_many(:infinity)

    last = times |> Enum.map(&List.last/1) |> Enum.max()

    %{
      rate: Enum.sum_by(times, &length/1) / (last - start) * 1.0e6,
      # While each has its first token and none its last: as llama.cpp counts.
      decode: decode(times),
      first: for([first | _] <- times, do: (first - start) / 1.0e3),
      gaps:
        Enum.flat_map(times, fn times ->
          for {a, b} <- Enum.zip(times, tl(times)), do: (b - a) / 1.0e3
        end)
    }
  end

  defp decode(times) do
    from = times |> Enum.map(&hd/1) |> Enum.max()
    last = times |> Enum.map(&List.last/1) |> Enum.max()
    Enum.sum_by(times, fn times -> Enum.count(times, &(&1 > from)) end) / (last - from) * 1.0e6
  end

  defp row(count, rounds) do
    all = fn key -> Enum.flat_map(rounds, fn {own, _peer} -> List.wrap(own[key]) end) end
    peers = for {_own, peer} <- rounds, peer != nil, do: peer
    ratios = for {own, peer} <- rounds, peer != nil, do: own.decode / peer

    peer =
      if peers == [],
        do: "",
        else:
          "#{shown(at(peers, 0.5))} (decode alone #{shown(at(all.(:decode), 0.5))}, #{shown(at(ratios, 0.5), 2)} times)"

    IO.puts(
      "| #{count} | #{shown(at(all.(:rate), 0.5))} | #{shown(at(all.(:first), 0.5))}, #{shown(at(all.(:first), 0.99))} | " <>
        "#{shown(at(all.(:gaps), 0.5))}, #{shown(at(all.(:gaps), 0.99))} | #{peer} |"
    )
  end

  # The better of llama.cpp with and without flash attention.
  defp llama_cpp(options, count, tokens) do
    if folder = options[:llama_cpp] do
      context = div(count * (tokens + 16) + 255, 256) * 256
      threads = Integer.to_string(div(:erlang.system_info(:logical_processors), 1))

      for flash <- ~w(0 1) do
        arguments =
          ~w(-m #{options[:gguf]} -t #{threads} -fa #{flash} -c #{context} -npp 8 -ntg #{tokens} -npl #{count} --output-format jsonl)

        {output, 0} =
          System.cmd(Path.join(folder, "llama-batched-bench"), arguments, stderr_to_stdout: true)

        [line] = output |> String.split("\n") |> Enum.filter(&String.starts_with?(&1, "{"))
        JSON.decode!(line)["speed_tg"]
      end
      |> Enum.max()
    end
  end

  defp at(list, share),
    do: list |> Enum.sort() |> Enum.at(min(floor(length(list) * share), length(list) - 1))

  defp shown(number, digits \\ 1), do: :erlang.float_to_binary(number * 1.0, decimals: digits)
  defp now, do: System.monotonic_time(:microsecond)
end

Streams.run(System.argv())
