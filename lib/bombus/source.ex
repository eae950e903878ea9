defmodule Bombus.Source do
  @moduledoc false
  # Where a model, a tokenizer or an adapter comes from.

  alias Bombus.{Error, Hub, Options}

  @type t ::
          :demo
          | {:demo, String.t()}
          | {:local, Path.t()}
          | {:hf, String.t()}
          | {:hf, String.t(), [Hub.option()]}
          | Path.t()

  @doc "The folder of a source, with what is needed for this kind of thing."
  @spec resolve(t(), Hub.kind(), nil | (Hub.progress() -> term())) ::
          {:ok, Path.t()} | {:error, Error.t()}
  def resolve(source, kind, on_progress \\ nil)
  def resolve({:hf, id}, kind, on_progress), do: Hub.fetch(id, [], kind, on_progress)

  def resolve({:hf, id, options}, kind, on_progress),
    do: Hub.fetch(id, options, kind, on_progress)

  def resolve(:demo, _kind, _on_progress), do: folder(shipped("demo"))

  def resolve({:demo, name}, _kind, _on_progress) when is_binary(name) do
    with {:error, _error} <- folder(shipped(Path.join("adapters", name))) do
      Error.error(
        :not_found,
        "there is no demo adapter #{inspect(name)}, only #{demo_adapters()}"
      )
    end
  end

  def resolve({:local, path}, kind, _on_progress) when is_binary(path),
    do: local(Path.expand(path), kind)

  def resolve(path, kind, _on_progress) when is_binary(path), do: local(Path.expand(path), kind)

  def resolve(other, _kind, _on_progress), do: none!(other)

  @doc "Raises for what is no source."
  @spec check!(t()) :: :ok
  def check!({:hf, id}), do: check!({:hf, id, []})

  def check!({:hf, id, options}) do
    Hub.Options.validate!(id, options)
    :ok
  end

  def check!(:demo), do: :ok
  def check!({kind, name}) when kind in [:local, :demo] and is_binary(name), do: :ok
  def check!(path) when is_binary(path), do: :ok
  def check!(other), do: none!(other)

  defp none!(other) do
    raise ArgumentError,
          "expected a source: {:local, path}, {:hf, \"owner/name\"}, :demo, {:demo, name} or a " <>
            "folder as a string, got: #{Options.show(other)}"
  end

  @doc """
  What a word in a command means: `demo`, a folder or file where there is one, else a Hub id where it
  looks like one.
  """
  @spec from_word(String.t()) :: t()
  def from_word("demo"), do: :demo

  def from_word(word) do
    if not File.exists?(word) and word =~ ~r{^[\w.-]+/[\w.-]+$} and not (word =~ ~r{^\.+/}),
      do: {:hf, word},
      else: {:local, word}
  end

  @doc "What a source is called, where it is shown: nothing of its options, which may hold a token."
  @spec name(t()) :: String.t()
  def name(:demo), do: "demo"
  def name({:hf, id, _options}) when is_binary(id), do: id
  def name({_kind, name}) when is_binary(name), do: name
  def name(name) when is_binary(name), do: name
  def name(other), do: Options.show(other)

  # An adapter may be one of a folder's files of tensors: a checkpoint of a training.
  defp local(path, :adapter), do: if(File.regular?(path), do: {:ok, path}, else: folder(path))
  defp local(path, _kind), do: folder(path)

  defp folder(path) do
    cond do
      File.dir?(path) -> {:ok, path}
      File.exists?(path) -> Error.error(:not_found, "expected a folder, `#{path}` is a file")
      true -> Error.error(:not_found, "there is no folder `#{path}` (a string is a local folder)")
    end
  end

  defp shipped(name), do: Application.app_dir(:bombus, Path.join("priv/models", name))

  defp demo_adapters do
    names = File.ls!(shipped("adapters"))
    names |> Enum.sort() |> Enum.map_join(", ", &inspect/1)
  end
end
