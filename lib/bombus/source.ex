defmodule Bombus.Source do
  @moduledoc false
  # Where a model, a tokenizer or an adapter comes from.

  alias Bombus.Error

  @type t ::
          :demo
          | {:demo, String.t()}
          | {:local, Path.t()}
          | {:hf, String.t()}
          | {:hf, String.t(), keyword()}
          | Path.t()

  @doc "The folder of a source."
  @spec resolve(t()) :: {:ok, Path.t()} | {:error, Error.t()}
  def resolve(:demo), do: folder(shipped("demo"))

  def resolve({:demo, name}) when is_binary(name) do
    with {:error, _error} <- folder(shipped(Path.join("adapters", name))) do
      Error.error(
        :not_found,
        "there is no demo adapter #{inspect(name)}, only #{demo_adapters()}"
      )
    end
  end

  def resolve({:local, path}) when is_binary(path), do: folder(Path.expand(path))
  def resolve(path) when is_binary(path), do: folder(Path.expand(path))

  def resolve({:hf, id}) when is_binary(id), do: hub(id)
  def resolve({:hf, id, options}) when is_binary(id) and is_list(options), do: hub(id)

  def resolve(other) do
    raise ArgumentError,
          "expected a source: {:local, path}, {:hf, \"owner/name\"}, :demo, {:demo, name} or a " <>
            "folder as a string, got: #{inspect(other)}"
  end

  @doc "What a source is called, where it is shown: nothing of its options, which may hold a token."
  @spec name(t()) :: String.t()
  def name(:demo), do: "demo"
  def name({:hf, id, _options}) when is_binary(id), do: id
  def name({_kind, name}) when is_binary(name), do: name
  def name(name) when is_binary(name), do: name
  def name(other), do: inspect(other)

  @doc "The folder of an adapter, or one of its files of tensors (a checkpoint of a training)."
  @spec resolve_adapter(t()) :: {:ok, Path.t()} | {:error, Error.t()}
  def resolve_adapter({:local, path}) when is_binary(path), do: adapter(Path.expand(path))
  def resolve_adapter(path) when is_binary(path), do: adapter(Path.expand(path))
  def resolve_adapter(other), do: resolve(other)

  defp adapter(path), do: if(File.regular?(path), do: {:ok, path}, else: folder(path))

  defp folder(path) do
    cond do
      File.dir?(path) -> {:ok, path}
      File.exists?(path) -> Error.error(:not_found, "expected a folder, `#{path}` is a file")
      true -> Error.error(:not_found, "there is no folder `#{path}` (a string is a local folder)")
    end
  end

  defp hub(id) do
    Error.error(
      :unsupported,
      "this version does not load from the Hugging Face Hub: download #{id} into a folder " <>
        "(`hf download #{id} --local-dir DIR`) and load {:local, DIR}"
    )
  end

  defp shipped(name), do: Application.app_dir(:bombus, Path.join("priv/models", name))

  defp demo_adapters do
    names = File.ls!(shipped("adapters"))
    names |> Enum.sort() |> Enum.map_join(", ", &inspect/1)
  end
end
