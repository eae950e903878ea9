defmodule Mix.Bombus.CommandLine do
  @moduledoc false
  # What the tasks have in common: their help, their options, and errors of one line.

  alias Bombus.Options.Unknown

  @doc """
  Runs a task with its options and words, or writes its help.

  `switches` are those of `OptionParser`. What goes wrong is a line, and an exit status of 1.
  """
  @spec run(String.t(), [String.t()], keyword(), (keyword(), [String.t()] -> term())) :: term()
  def run(task, arguments, switches, fun) do
    if help?(arguments) do
      one_line(fn -> Mix.Task.rerun("help", [task]) end)
    else
      {options, words} = parse!(task, arguments, switches)
      one_line(fn -> fun.(options, words) end)
    end
  end

  # Behind `--` everything is text.
  defp help?(arguments) do
    arguments |> Enum.take_while(&(&1 != "--")) |> Enum.any?(&(&1 in ["--help", "-h"]))
  end

  defp parse!(task, arguments, switches) do
    case OptionParser.parse(arguments, strict: switches) do
      {options, words, []} -> {options, words}
      {_options, _words, [{option, value} | _others]} -> wrong!(task, option, value, switches)
    end
  end

  defp wrong!(task, option, value, switches) do
    name = option |> String.trim_leading("-") |> String.replace("-", "_")

    case Enum.find(switches, fn {key, _type} -> Atom.to_string(key) == name end) do
      {_key, type} when value != nil ->
        Mix.raise("expected #{option} to be #{words(type)}, got: #{value}")

      {_key, _type} ->
        Mix.raise("expected a value behind #{option}")

      nil ->
        Mix.raise("unknown option #{option}, " <> meant(task, name, Keyword.keys(switches)))
    end
  end

  defp meant(task, name, keys) do
    if meant = Unknown.meant(name, keys),
      do: "did you mean #{switch(meant)}?",
      else: "mix #{task} takes #{Enum.map_join(Enum.uniq(keys), ", ", &switch/1)}"
  end

  defp words(:integer), do: "a whole number"
  defp words(:float), do: "a number"
  defp words(:boolean), do: "given without a value"
  defp words(_other), do: "a text"

  @doc "An option as it is written in a terminal."
  def switch(key), do: "--" <> String.replace(Atom.to_string(key), "_", "-")

  @doc "Runs a function, and ends the task with a line where that goes wrong."
  def one_line(fun) do
    fun.()
  rescue
    error in [Bombus.Error, ArgumentError, File.Error] ->
      Mix.raise(Exception.message(error))

    error in ErlangError ->
      unread!(error, __STACKTRACE__)
  end

  # Nobody reads any more, as with `| head`.
  defp unread!(%{original: reason}, _stacktrace) when reason in [:terminated, :epipe], do: :ok
  defp unread!(error, stacktrace), do: reraise(error, stacktrace)
end
