defmodule Bombus.Native.Library do
  @moduledoc false
  # The module that the NIFs belong to. It is in no file: it is made of `Bombus.Native` and loaded
  # once, so that no compiler, no `recompile` and no hot upgrade replaces or purges it. The engine's
  # threads live in its library, and so do the models of this VM.

  require Logger

  @module :bombus_nif
  # Where the library was when it was loaded.
  @key {__MODULE__, :loaded}

  @doc "The code of a module with these functions, `[{name, arity}]`, until a library has them."
  def compile(functions) do
    stubs = for {name, arity} <- functions, do: stub(name, arity)
    exports = [{:load, 1} | functions]

    forms = [
      {:attribute, 1, :module, @module},
      {:attribute, 1, :export, exports},
      load_form() | stubs
    ]

    {:ok, @module, code} = :compile.forms(forms, [:binary])
    code
  end

  defp load_form do
    call = call(:load_nif, [{:var, 1, :Path}, {:integer, 1, 0}])
    {:function, 1, :load, 1, [{:clause, 1, [{:var, 1, :Path}], [], [call]}]}
  end

  defp stub(name, arity) do
    arguments = List.duplicate({:var, 1, :_}, arity)

    {:function, 1, name, arity,
     [{:clause, 1, arguments, [], [call(:nif_error, [{:atom, 1, :not_loaded}])]}]}
  end

  defp call(function, arguments) do
    {:call, 1, {:remote, 1, {:atom, 1, :erlang}, {:atom, 1, function}}, arguments}
  end

  @doc "The module, which is loaded with the library where it is not there yet."
  def module!(code, path \\ &path/0) do
    unless loaded?(), do: alone(fn -> loaded?() || load!(code, path.()) end)
    @module
  end

  # Without its ending, as `:erlang.load_nif/2` takes it.
  defp path, do: Path.join(:code.priv_dir(:bombus), "native/bombus_nif")

  defp loaded?, do: :persistent_term.get(@key, nil) != nil

  # Several processes may need it first. A node that starts no distribution has no `:global`.
  defp alone(work) do
    if Process.whereis(:global_name_server),
      do: :global.trans({@module, self()}, work, [node()]),
      else: work.()
  end

  defp load!(code, path) do
    {:module, @module} = :code.load_binary(@module, ~c"bombus_nif", code)

    case apply(@module, :load, [path]) do
      :ok ->
        :persistent_term.put(@key, {:file, identity(path)})

      {:error, {_reason, text}} ->
        :code.delete(@module)
        :code.purge(@module)
        raise "could not load the engine of Bombus: #{text} (`mix compile` builds it)"
    end
  end

  @doc "Whether the file of the library is another than the one that this VM has loaded."
  def replaced?(path) do
    case {:persistent_term.get(@key, nil), identity(path)} do
      {nil, _identity} -> false
      {{:file, loaded}, identity} -> identity not in [loaded, nil]
    end
  end

  @doc "Says so, where it is."
  def warn_if_replaced(path \\ path()) do
    if replaced?(path) do
      Logger.warning(
        "the engine of Bombus was built anew: this VM goes on with the one that it has loaded; " <>
          "restart the VM to use the new one"
      )
    end

    :ok
  end

  defp identity(path) do
    case File.stat("#{path}.so", time: :posix) do
      {:ok, stat} -> {stat.inode, stat.size, stat.mtime}
      {:error, _reason} -> nil
    end
  end
end
