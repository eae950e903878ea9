defmodule Bombus.Source do
  @moduledoc false
  # Where a model, a tokenizer or an adapter comes from.

  alias Bombus.{Error, Hub, Options}

  @type t :: Bombus.source()

  @doc """
  The folder of a source, with what is needed for this kind of thing. An `:outline` of the Hub's is a
  new folder for a model without its weights, which the caller removes.
  """
  @spec resolve(t(), Hub.kind() | :outline, nil | (Hub.progress() -> term())) ::
          {:ok, Path.t()} | {:error, Error.t()}
  def resolve(source, kind, on_progress \\ nil)
  def resolve({:hf, id}, kind, on_progress), do: resolve({:hf, id, []}, kind, on_progress)

  def resolve({:hf, id, options}, kind, on_progress) do
    with {:error, error} <- Hub.fetch(id, options, kind, on_progress),
         do: {:error, nor_a_folder(error, id)}
  end

  def resolve(:demo, _kind, _on_progress), do: folder(shipped("demo"))

  def resolve({:demo, name}, _kind, _on_progress) when is_binary(name) do
    if name in demo_adapters() do
      folder(shipped(Path.join("adapters", name)))
    else
      names = Enum.map_join(demo_adapters(), ", ", &inspect/1)
      Error.error(:not_found, "there is no demo adapter #{Options.show(name)}, only #{names}")
    end
  end

  def resolve({:local, path}, kind, _on_progress) when is_binary(path),
    do: local(path!(path), kind)

  def resolve(path, kind, _on_progress) when is_binary(path), do: local(path!(path), kind)

  def resolve(other, _kind, _on_progress), do: none!(other)

  @doc "Raises for what is no source."
  @spec check!(t()) :: :ok
  def check!({:hf, id}), do: check!({:hf, id, []})

  def check!({:hf, id, options}) do
    Hub.Options.validate!(id, options)
    :ok
  end

  def check!(:demo), do: :ok
  def check!({:demo, name}) when is_binary(name), do: :ok
  def check!({:local, path}) when is_binary(path), do: check!(path)

  def check!(path) when is_binary(path) do
    _path = path!(path)
    :ok
  end

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
    if hub_id?(word) and not File.exists?(word),
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

  # A word may have been meant as either.
  defp nor_a_folder(%Error{reason: reason, message: message} = error, id)
       when reason in [:not_found, :unauthorized, :offline, :no_network] do
    repository? = reason != :not_found or message =~ "is not there"

    if repository? and not File.exists?(id),
      do: %{error | message: "#{message}. There is no folder `#{id}` here either"},
      else: error
  end

  defp nor_a_folder(error, _id), do: error

  defp path!(path) do
    unless Options.path?(path) do
      raise ArgumentError, "expected the path of a folder, got: #{Options.show(path)}"
    end

    Path.expand(path)
  end

  # An adapter may be one of a folder's files of tensors: a checkpoint of a training.
  defp local(path, :adapter), do: if(File.regular?(path), do: {:ok, path}, else: folder(path))
  defp local(path, _kind), do: folder(path)

  defp folder(path) do
    cond do
      File.dir?(path) -> {:ok, path}
      File.exists?(path) -> Error.error(:not_found, "expected a folder, `#{path}` is a file")
      true -> Error.error(:not_found, "there is no folder `#{path}`" <> nor_an_id(path))
    end
  end

  # A string is a folder, and may have been meant for an id.
  defp nor_an_id(path) do
    id = Path.relative_to_cwd(path)

    if id != path and hub_id?(id),
      do: " (a string is a local folder: for the Hub write {:hf, #{inspect(id)}})",
      else: " (a string is a local folder)"
  end

  defp hub_id?(word), do: word =~ ~r{^[\w.-]+/[\w.-]+$} and not (word =~ ~r{^\.+/})

  defp shipped(name), do: Application.app_dir(:bombus, Path.join("priv/models", name))

  defp demo_adapters, do: "adapters" |> shipped() |> File.ls!() |> Enum.sort()
end
