defmodule Bombus.Training.LoRA.Jsonl do
  @moduledoc false
  # train.jsonl and valid.jsonl, looked at before a training begins: mlx_lm takes the format of the
  # first row for all, and says of a wrong one neither file nor line.

  alias Bombus.Error

  # Faults that an error shows, of however many.
  @shown 5
  # Bytes of a line: what is longer would take many times that to decode.
  @most 64 * 1024 * 1024
  @chunk 64 * 1024
  @expected "expected messages, prompt and completion, or text"

  @doc "Whether a training can begin with what is in `dir`."
  @spec check(Path.t(), pos_integer(), boolean()) :: :ok | {:error, Error.t()}
  def check(dir, batch_size, mask_prompt) do
    with :ok <- check_file(Path.join(dir, "train.jsonl"), batch_size, mask_prompt) do
      valid = Path.join(dir, "valid.jsonl")
      empty? = match?({:ok, %{type: :regular, size: 0}}, File.stat(valid))

      if File.exists?(valid) and not empty?,
        do: check_file(valid, batch_size, mask_prompt),
        else: :ok
    end
  end

  defp check_file(path, batch_size, mask_prompt) do
    with :ok <- readable(path) do
      path
      |> lines()
      |> Stream.with_index(1)
      |> Enum.reduce(
        %{mask_prompt: mask_prompt, first: nil, count: 0, faults: [], wrong: 0},
        &row/2
      )
      |> verdict(path, batch_size)
    end
  rescue
    error in File.Error -> not_found(path, error.reason)
  end

  defp readable(path) do
    case File.stat(path) do
      {:ok, %{type: :regular}} -> :ok
      {:ok, %{type: type}} -> Error.error(:not_found, "`#{path}` is no file: it is #{kind(type)}")
      {:error, reason} -> not_found(path, reason)
    end
  end

  defp kind(:directory), do: "a folder"
  defp kind(:device), do: "a device"
  defp kind(_other), do: "a FIFO or a socket"

  # Each line without its end, or `:too_long`, which is the last. `File.stream!/1` would take a line of
  # any length, and look at its beginning again with each chunk.
  defp lines(path) do
    path
    |> File.stream!(@chunk)
    |> Stream.transform(fn -> {[], 0} end, &cut/2, &last/1, fn _begun -> :ok end)
  end

  # `begun`: what there is of a line whose end is in a later chunk, and its bytes
  defp cut(_chunk, :over), do: {:halt, :over}

  defp cut(chunk, {parts, size}) do
    [part | others] = :binary.split(chunk, "\n", [:global])
    size = size + byte_size(part)

    cond do
      size > @most ->
        {[:too_long], :over}

      others == [] ->
        {[], {[parts | part], size}}

      true ->
        {whole, [begun]} = Enum.split(others, -1)
        {[IO.iodata_to_binary([parts | part]) | whole], {begun, byte_size(begun)}}
    end
  end

  defp last(:over), do: {[], :over}
  defp last({parts, _size}), do: {[IO.iodata_to_binary(parts)], :over}

  defp not_found(path, reason) do
    Error.error(:not_found, "cannot read `#{path}`: #{:file.format_error(reason)}")
  end

  defp verdict(%{faults: [], count: count}, path, batch_size) do
    if count >= batch_size do
      :ok
    else
      Error.error(
        :too_few_rows,
        "`#{path}` has #{count} rows, fewer than the batch size #{batch_size}: " <>
          "add rows or lower :batch_size"
      )
    end
  end

  defp verdict(%{faults: faults, wrong: wrong}, path, _batch_size) do
    more = if wrong > @shown, do: "; and #{wrong - @shown} more", else: ""
    faults = faults |> Enum.reverse() |> Enum.join("; ")
    Error.error(:bad_training_data, "`#{path}`, #{faults}#{more}")
  end

  defp row({:too_long, number}, state) do
    most = div(@most, 1024 * 1024)
    faulty(state, "line #{number}: it is too long, a line may have #{most} MiB")
  end

  defp row({line, number}, state) do
    line = if number == 1, do: String.trim_leading(line, "\uFEFF"), else: line

    if String.trim(line) == "",
      do: state,
      else: counted(%{state | count: state.count + 1}, line, number)
  end

  defp counted(state, line, number) do
    with {:ok, row} <- decode(line),
         {:ok, format} <- format(row),
         first = state.first || {format, number},
         :ok <- same(format, first, row),
         :ok <- content(elem(first, 0), row, state.mask_prompt) do
      %{state | first: first}
    else
      {:fault, fault} -> faulty(state, "line #{number}: #{fault}")
    end
  end

  defp faulty(state, fault) do
    faults = if state.wrong < @shown, do: [fault | state.faults], else: state.faults
    %{state | faults: faults, wrong: state.wrong + 1}
  end

  defp decode(line) do
    if String.valid?(line), do: json(line), else: {:fault, "no JSON, for it is not valid UTF-8"}
  end

  defp json(line) do
    case JSON.decode(line) do
      {:ok, row} -> {:ok, row}
      {:error, {:unexpected_end, _place}} -> {:fault, "no JSON, it ends too early"}
      {:error, {_what, place, _byte}} -> {:fault, "no JSON from byte #{place + 1} on"}
      {:error, {_what, place}} -> {:fault, "no JSON from byte #{place + 1} on"}
    end
  end

  # In mlx_lm's order.
  defp format(%{"prompt" => _prompt, "completion" => _completion}), do: {:ok, :completions}
  defp format(%{"messages" => _messages}), do: {:ok, :messages}
  defp format(%{"text" => _text}), do: {:ok, :text}
  defp format(_other), do: {:fault, @expected}

  # The other keys of a row do not count.
  defp same(format, {format, _line}, _row), do: :ok
  defp same(_format, {:messages, _line}, %{"messages" => _messages}), do: :ok
  defp same(_format, {:text, _line}, %{"text" => _text}), do: :ok

  defp same(format, {first, line}, _row) do
    {:fault, "it has #{named(format)} where line #{line} has #{named(first)}: one format for all"}
  end

  defp named(:completions), do: "prompt and completion"
  defp named(:messages), do: "messages"
  defp named(:text), do: "text"

  defp content(:text, %{"text" => text}, mask_prompt) do
    cond do
      mask_prompt -> {:fault, "a text has no prompt to mask: give mask_prompt: false"}
      not is_binary(text) -> {:fault, "text is no string"}
      text == "" -> {:fault, "text is empty"}
      true -> :ok
    end
  end

  defp content(:completions, %{"prompt" => prompt, "completion" => completion}, _mask_prompt) do
    cond do
      not is_binary(prompt) -> {:fault, "prompt is no string"}
      not is_binary(completion) -> {:fault, "completion is no string"}
      true -> :ok
    end
  end

  defp content(:messages, %{"messages" => [_first | _rest] = messages}, _mask_prompt) do
    messages |> Enum.with_index(1) |> Enum.find_value(:ok, &wrong_message/1)
  end

  defp content(:messages, _row, _mask_prompt), do: {:fault, "messages is no list of messages"}

  # -> nil where there is nothing wrong
  defp wrong_message({%{"role" => role} = message, number}) when is_binary(role) do
    if fault = wrong_content(message["content"]), do: {:fault, "message #{number}: #{fault}"}
  end

  defp wrong_message({_message, number}), do: {:fault, "message #{number} has no role"}

  # mlx_lm's server takes null for an empty text, and joins the parts of a list.
  defp wrong_content(content) when is_nil(content) or is_binary(content), do: nil

  defp wrong_content(parts) when is_list(parts) do
    Enum.find_value(parts, fn
      %{"type" => "text", "text" => text} when is_binary(text) -> nil
      %{"type" => type} -> "a part is of type #{inspect(type)}, only texts can be trained with"
      _other -> "a part of the content has no type"
    end)
  end

  defp wrong_content(_other), do: "its content is no text"
end
