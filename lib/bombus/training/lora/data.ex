defmodule Bombus.Training.LoRA.Data do
  @moduledoc false
  # train.jsonl and valid.jsonl: what mlx_lm's lora command reads.

  alias Bombus.Error
  alias Bombus.Training.LoRA.Options

  @defaults [prompt: "Write a post", split_ratio: 0.9, min_length: 1, shuffle_seed: 0]

  @spec prepare([term()], Path.t(), keyword()) :: :ok | {:error, :no_valid_content | Error.t()}
  def prepare(contents, dir, options) do
    options = options!(options)

    case Enum.flat_map(contents, &row(&1, options)) do
      [] -> {:error, :no_valid_content}
      rows -> write(rows, dir, options)
    end
  end

  defp options!(options) do
    options = Keyword.validate!(options, @defaults)

    Options.check!(
      options,
      :split_ratio,
      "above 0 and at most 1",
      &(is_number(&1) and &1 > 0 and &1 <= 1)
    )

    Options.check!(options, :min_length, "a number of characters", &(is_integer(&1) and &1 >= 0))
    Options.check!(options, :prompt, "a text", &text?/1)
    Options.check!(options, :shuffle_seed, "an integer", &is_integer/1)
    options
  end

  # -> a list of one conversation, or of none
  defp row(%{messages: messages}, options) when is_list(messages) do
    messages = Enum.map(messages, &message/1)

    with true <- Enum.all?(messages, & &1),
         %{role: "assistant", content: answer} <- List.last(messages),
         true <- long?(answer, options) do
      [messages]
    else
      _other -> []
    end
  end

  defp row(%{prompt: prompt, completion: completion}, options) do
    if text?(prompt) and long?(completion, options), do: [pair(prompt, completion)], else: []
  end

  defp row(content, options) do
    if long?(content, options), do: [pair(options[:prompt], String.trim(content))], else: []
  end

  defp message(%{role: role, content: content}) when is_binary(content) do
    if String.valid?(content), do: %{role: to_string(role), content: content}
  end

  defp message(_other), do: nil

  defp pair(prompt, answer) do
    [%{role: "user", content: prompt}, %{role: "assistant", content: answer}]
  end

  defp text?(text), do: is_binary(text) and String.valid?(text) and String.trim(text) != ""

  defp long?(text, options) do
    text?(text) and String.length(String.trim(text)) >= options[:min_length]
  end

  defp write(rows, dir, options) do
    rows = shuffle(rows, options[:shuffle_seed])
    # Something to learn from, and where there are two rows, something to check it with.
    most = if options[:split_ratio] < 1, do: max(length(rows) - 1, 1), else: length(rows)
    train = (length(rows) * options[:split_ratio]) |> round() |> max(1) |> min(most)
    {train, valid} = Enum.split(rows, train)

    with :ok <- File.mkdir_p(dir),
         :ok <- File.write(Path.join(dir, "train.jsonl"), Enum.map(train, &line/1)),
         :ok <- File.write(Path.join(dir, "valid.jsonl"), Enum.map(valid, &line/1)) do
      :ok
    else
      {:error, reason} ->
        Error.error(:io, "cannot write to `#{dir}`: #{:file.format_error(reason)}")
    end
  end

  defp shuffle(rows, seed) do
    {keyed, _state} = Enum.map_reduce(rows, :rand.seed_s(:exsss, seed), &keyed/2)
    keyed |> Enum.sort_by(&elem(&1, 0)) |> Enum.map(&elem(&1, 1))
  end

  defp keyed(row, state) do
    {key, state} = :rand.uniform_s(state)
    {{key, row}, state}
  end

  defp line(messages), do: [JSON.encode_to_iodata!(%{messages: messages}), ?\n]

  @doc "Whether a training can begin with what is in `dir`."
  @spec check(Path.t(), pos_integer(), boolean()) :: :ok | {:error, Error.t()}
  def check(dir, batch_size, mask_prompt) do
    with :ok <- check_file(Path.join(dir, "train.jsonl"), batch_size, mask_prompt) do
      valid = Path.join(dir, "valid.jsonl")
      empty? = match?({:ok, %{size: 0}}, File.stat(valid))

      if File.exists?(valid) and not empty?,
        do: check_file(valid, batch_size, mask_prompt),
        else: :ok
    end
  end

  defp check_file(path, batch_size, mask_prompt) do
    with {:ok, text} <- read(path),
         {:ok, count} <- count(path, text, mask_prompt) do
      if count >= batch_size do
        :ok
      else
        Error.error(
          :too_few_rows,
          "`#{path}` has #{count} rows, fewer than the batch size #{batch_size}"
        )
      end
    end
  end

  defp read(path) do
    with {:error, reason} <- File.read(path) do
      Error.error(:not_found, "cannot read `#{path}`: #{:file.format_error(reason)}")
    end
  end

  defp count(path, text, mask_prompt) do
    lines = text |> String.split("\n") |> Enum.with_index(1)
    rows = Enum.reject(lines, fn {line, _number} -> String.trim(line) == "" end)

    faults =
      for {line, number} <- rows, fault = fault(line, mask_prompt), do: "line #{number}: #{fault}"

    case faults do
      [] ->
        {:ok, length(rows)}

      _some ->
        Error.error(:bad_training_data, "`#{path}`, " <> Enum.join(Enum.take(faults, 5), "; "))
    end
  end

  defp fault(line, mask_prompt) do
    case JSON.decode(line) do
      {:ok, %{"messages" => [_first | _rest]}} -> nil
      {:ok, %{"prompt" => _prompt, "completion" => _completion}} -> nil
      {:ok, %{"text" => _text}} when not mask_prompt -> nil
      {:ok, %{"text" => _text}} -> "a text has no prompt to mask: give mask_prompt: false"
      {:ok, _other} -> "expected messages, prompt and completion, or text"
      {:error, _reason} -> "no JSON"
    end
  end
end
