defmodule Mix.Bombus.ModelInfo do
  @moduledoc false
  # What a model is, as lines for a terminal.

  @width 12

  @doc "The lines of what `Bombus.Model.Info.read/2` says."
  @spec lines(Bombus.Model.Info.t()) :: [String.t()]
  def lines(info) do
    [
      source: info.source,
      family: family(info),
      layers: layers(info),
      windows: windows(info.windows),
      rope: rope(info),
      context: "#{info.context} positions",
      parameters: count(info.parameters),
      bits: Enum.map(info.parts, &part/1),
      files: if(info.disk > 0, do: bytes(info.disk), else: "not whole"),
      memory: memory(info.memory),
      device: device(info),
      tokenizer: tokenizer(info),
      missing: info.missing_files ++ Enum.map(info.missing_tensors, &"the tensor #{&1}"),
      warnings: info.warnings,
      loads: loads(info.problems)
    ]
    |> Enum.flat_map(&row/1)
  end

  # A name stands beside the first of its lines.
  defp row({name, lines}) do
    names = Stream.concat([Atom.to_string(name)], Stream.cycle([""]))

    for {name, line} <- Enum.zip(names, List.wrap(lines)),
        do: String.pad_trailing(name, @width) <> line
  end

  defp family(%{language_model: nil, family: family}), do: family

  defp family(%{language_model: inner, family: family}),
    do: "#{family}, its language model #{inner}"

  defp layers(info) do
    "#{info.layers} of #{info.hidden_size}: #{info.heads} heads of #{info.head_dim}, " <>
      "#{info.kv_heads} of keys and values; a vocabulary of #{info.vocab_size}"
  end

  defp windows([]), do: "none"

  defp windows(windows) do
    for {layers, positions} <- windows, do: "#{layers} layers see the last #{positions} positions"
  end

  defp rope(%{rope: nil}), do: "none"

  defp rope(%{rope: rope} = info) do
    [
      "theta #{number(rope.theta)}",
      if(rope.dim < info.head_dim, do: "#{rope.dim} of #{info.head_dim} numbers of a head"),
      scaling(rope),
      if(info.unrotated > 0, do: "none in #{info.unrotated} layers")
    ]
    |> Enum.reject(&is_nil/1)
    |> Enum.join(", ")
  end

  defp scaling(%{scaling: :none}), do: nil
  defp scaling(%{scaling: scaling, factor: nil}), do: "#{scaling}"
  defp scaling(%{scaling: scaling, factor: factor}), do: "#{scaling} by #{number(factor)}"

  defp part(%{role: role, layouts: layouts}) do
    String.pad_trailing(Atom.to_string(role), 11) <> Enum.map_join(layouts, "; ", &layout/1)
  end

  defp layout(%{bits: nil, parameters: parameters}), do: "dense (#{count(parameters)})"

  defp layout(%{bits: bits, group_size: size, parameters: parameters}),
    do: "#{bits} in groups of #{size} (#{count(parameters)})"

  defp memory(memory) do
    [
      "#{bytes(memory.weights)} of weights",
      "#{bytes(memory.kv_position)} of keys and values for each position of a sequence, " <>
        "#{bytes(memory.kv_context)} for the whole context"
    ]
  end

  defp device(%{device: device, steps: steps}) do
    name = device |> inspect() |> String.trim_leading(":")
    "#{name}: " <> steps(steps)
  end

  defp steps({:own, nil}), do: "Bombus's own kernels"
  defp steps({:mlx, nil}), do: "MLX, layer by layer"
  defp steps({:fused, nil}), do: "one kernel for all layers where tokens are single"

  defp steps({:layer_by_layer, why}),
    do: "layer by layer, which is slower than one kernel for all layers: #{why}"

  defp tokenizer(%{tokenizer: false}), do: "there is none here"
  defp tokenizer(%{chat_template: true}), do: "with a chat template"
  defp tokenizer(_info), do: "without a chat template"

  defp loads([]), do: "yes"
  defp loads(problems), do: ["no" | Enum.map(problems, & &1.message)]

  defp count(number) when number < 1_000_000, do: "#{number}"
  defp count(number) when number < 1_000_000_000, do: "#{decimals(number / 1.0e6)} million"
  defp count(number), do: "#{decimals(number / 1.0e9)} billion"

  defp bytes(bytes) when bytes < 10_000, do: "#{bytes} bytes"
  defp bytes(bytes) when bytes < 1_000_000, do: "#{div(bytes, 1000)} kB"
  defp bytes(bytes) when bytes < 1_000_000_000, do: "#{decimals(bytes / 1.0e6)} MB"
  defp bytes(bytes), do: "#{decimals(bytes / 1.0e9)} GB"

  defp decimals(number), do: :erlang.float_to_binary(number, decimals: 1)

  # 10000 for 1.0e4
  defp number(number) when number == trunc(number), do: "#{trunc(number)}"
  defp number(number), do: "#{number}"
end
