defmodule Bombus.Handle do
  @moduledoc false
  # Structs that stand for something in the engine: a model, a tokenizer, an adapter. Each of their
  # modules says what it is, so that those who check options need not know them.

  alias Bombus.Native

  @type kind :: :model | :tokenizer | :adapter

  @doc "What the engine calls it, what a message calls it, and the function that makes it."
  @callback handle() :: {kind(), name :: String.t(), made_by :: String.t()}

  @doc """
  `:ok`, or what was expected in place of the value, which may be a handle of another node: what that
  stands for is in the memory of the node that loaded it.
  """
  @spec check(term(), module()) :: :ok | {:error, String.t()} | {:error, String.t(), String.t()}
  def check(%module{ref: ref}, module) when is_reference(ref) and node(ref) == node() do
    {kind, _name, _made_by} = module.handle()

    if Native.kind(ref) == kind,
      do: :ok,
      else:
        {:error, words(module),
         "what it stood for is not in the memory of this node: load it again"}
  end

  def check(%module{ref: ref}, module) when is_reference(ref) do
    {_kind, name, _made_by} = module.handle()
    node = inspect(node(ref))

    {:error, "#{name} of this node",
     "it was loaded on #{node}, and works there: " <>
       "run a serving there, and call Bombus.Serving.batched_run({name, #{node}}, input)"}
  end

  def check(_other, module), do: {:error, words(module)}

  @doc "A handle of this kind in the words of a message."
  @spec words(module()) :: String.t()
  def words(module) do
    {_kind, name, made_by} = module.handle()
    "#{name} made by #{made_by}"
  end
end
