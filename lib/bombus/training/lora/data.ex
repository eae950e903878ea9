defmodule Bombus.Training.LoRA.Data do
  @moduledoc false
  # train.jsonl and valid.jsonl: what mlx_lm's lora command reads. Rows go through a file, so that a
  # stream of any length takes little memory: of each only its place there is kept.

  alias Bombus.{Error, OrderedJSON}
  alias Bombus.Training.LoRA.{Options, Row}

  # Rows left out of which the report says which they are.
  @examples 10

  @spec prepare(Enumerable.t(), Path.t(), keyword()) :: {:ok, map()} | {:error, Error.t()}
  def prepare(contents, dir, options) do
    options = Options.validate!(options, :prepare)
    contents!(contents)
    dir!(dir)
    made? = not File.dir?(dir)

    try do
      ok!(File.mkdir_p(dir))
      with_file(part(dir, "rows"), [:read, :write], &prepare_in(&1, contents, dir, options))
    catch
      {:io, reason} -> io(dir, reason)
    after
      # What is not empty stays.
      if made?, do: File.rmdir(dir)
    end
  end

  defp prepare_in(spool, contents, dir, options) do
    contents
    |> Stream.with_index(1)
    |> Enum.reduce(start(spool, options), &take/2)
    |> write(dir)
  end

  # A file of its own, which is closed and gone afterwards, unless it was renamed.
  defp with_file(path, modes, fun) do
    file = ok!(:file.open(path, [:exclusive, :raw, :binary | modes]))

    try do
      fun.(file)
    after
      :file.close(file)
      File.rm(path)
    end
  end

  defp contents!(contents) do
    one_row? = is_map(contents) and not is_struct(contents)

    if one_row? or Enumerable.impl_for(contents) == nil or
         (is_list(contents) and List.improper?(contents)) or
         (is_function(contents) and not is_function(contents, 2)) do
      raise ArgumentError,
            "expected a list or another enumerable of rows, got: " <>
              inspect(contents, limit: 5, printable_limit: 100)
    end
  end

  defp dir!(dir) do
    unless Bombus.Options.path?(dir) do
      raise ArgumentError, "expected the path of a folder, got: #{Bombus.Options.show(dir)}"
    end
  end

  defp start(spool, options) do
    %{
      spool: spool,
      options: options,
      random: :rand.seed_s(:exsss, options.shuffle_seed),
      size: 0,
      places: [],
      skipped: 0,
      reasons: %{},
      examples: []
    }
  end

  defp take({row, number}, state) do
    with {:ok, object} <- Row.conversation(row, state.options),
         {:ok, line} <- line(object) do
      keep(state, line)
    else
      {:skip, reason} -> skip(state, number, reason)
    end
  end

  defp line(object) do
    {:ok, IO.iodata_to_binary([OrderedJSON.encode(object, :row), ?\n])}
  catch
    {_kind, _term} -> {:skip, "it has something that is no JSON"}
  end

  defp keep(state, line) do
    ok!(:file.pwrite(state.spool, state.size, line))
    {key, random} = :rand.uniform_s(state.random)
    place = {key, state.size, byte_size(line)}
    size = state.size + byte_size(line)
    %{state | random: random, size: size, places: [place | state.places]}
  end

  defp skip(state, number, reason) do
    examples =
      if state.skipped < @examples,
        do: [%{row: number, reason: reason} | state.examples],
        else: state.examples

    reasons = Map.update(state.reasons, reason, 1, &(&1 + 1))
    %{state | skipped: state.skipped + 1, reasons: reasons, examples: examples}
  end

  defp write(%{places: []} = state, _dir) do
    Error.error(:no_valid_content, "there is no row to train with" <> why(report(state, 0, 0)))
  end

  # Both are whole before the first takes the place of an earlier one.
  defp write(state, dir) do
    {train, valid} = split(Enum.sort(state.places), state.options.split_ratio)

    filled(part(dir, "train"), state.spool, train, fn train_part ->
      filled(part(dir, "valid"), state.spool, valid, fn valid_part ->
        ok!(File.rename(train_part, Path.join(dir, "train.jsonl")))
        ok!(File.rename(valid_part, Path.join(dir, "valid.jsonl")))
      end)
    end)

    {:ok, report(state, length(train), length(valid))}
  end

  # Something to learn from, and where there are two rows, something to check it with.
  defp split(places, ratio) do
    count = length(places)
    most = if ratio < 1, do: max(count - 1, 1), else: count
    Enum.split(places, (count * ratio) |> round() |> max(1) |> min(most))
  end

  # Runs the function while the path holds the rows of these places.
  defp filled(path, spool, places, fun) do
    with_file(path, [:write, :delayed_write], fn file ->
      for {_key, place, size} <- places do
        ok!(:file.write(file, ok!(:file.pread(spool, place, size))))
      end

      # What was delayed may fail only now.
      ok!(:file.close(file))
      fun.(path)
    end)
  end

  defp report(state, train, valid) do
    %{
      train: train,
      valid: valid,
      skipped: state.skipped,
      reasons: state.reasons,
      examples: Enum.reverse(state.examples)
    }
  end

  @doc "The rows that a report says were left out, as the end of a sentence."
  def why(%{skipped: 0}), do: ""

  def why(%{skipped: skipped, reasons: reasons, examples: [first | _rest]}) do
    reasons = reasons |> Enum.sort_by(&(-elem(&1, 1))) |> Enum.take(5)
    counted = Enum.map_join(reasons, "; ", fn {reason, count} -> "#{reason} (#{count})" end)
    "; rows left out: #{skipped}, the first of them row #{first.row}: #{counted}"
  end

  defp part(dir, name) do
    Path.join(dir, ".#{name}.#{System.pid()}-#{System.unique_integer([:positive])}.part")
  end

  defp ok!(:ok), do: :ok
  defp ok!({:ok, value}), do: value
  defp ok!({:error, reason}), do: throw({:io, reason})
  defp ok!(:eof), do: throw({:io, :eio})

  defp io(dir, reason) do
    kind = if reason in [:enospc, :edquot, :efbig], do: :disk_full, else: :io
    Error.error(kind, "cannot write to `#{dir}`: #{:file.format_error(reason)}")
  end
end
