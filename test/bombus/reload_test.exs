defmodule Bombus.ReloadTest do
  # The module of the NIFs is loaded anew while its library works: in a VM of its own.
  use ExUnit.Case, async: true

  @moduletag timeout: 120_000

  # As Mix does it in `recompile(force: true)`, and as a hot upgrade does.
  @reloads %{
    "recompile" => """
      :code.purge(Bombus.Native)
      :code.delete(Bombus.Native)
      Code.compiler_options(ignore_module_conflict: true)
      Code.compile_file(#{inspect(Path.expand("lib/bombus/native.ex"))})
    """,
    "load_file" => """
      :code.purge(Bombus.Native)
      {:module, Bombus.Native} = :code.load_file(Bombus.Native)
    """,
    "delete and purge" => """
      :code.purge(Bombus.Native)
      true = :code.delete(Bombus.Native)
      :code.purge(Bombus.Native)
      {:module, Bombus.Native} = :code.load_file(Bombus.Native)
    """,
    "purge of all that can be purged" => """
      for {module, _file} <- :code.all_loaded(), do: :code.soft_purge(module)
      {:module, Bombus.Native} = :code.load_file(Bombus.Native)
    """
  }

  for {name, reload} <- @reloads do
    test "#{name}: models, servings and streams go on" do
      script = """
      {:ok, _} = Application.ensure_all_started(:bombus)
      model = Bombus.load_model!(#{inspect(Bombus.Fixtures.checkpoint("f32-untied"))}, device: :cpu)
      adapter = Bombus.load_adapter!({:demo, "pirate"})
      {:ok, _} = Bombus.Serving.start_link(name: Running, model: model, tokenizer: nil)
      input = %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 400}
      %{results: [%{token_ids: expected}]} = Bombus.Serving.batched_run(Running, input)
      owner = self()

      spawn_link(fn ->
        stream = Bombus.Serving.stream(Running, input)
        ids = Enum.map(stream, fn id -> send(owner, :token); Process.sleep(1); id end)
        send(owner, {:ids, ids})
      end)

      receive do: (:token -> :ok)

      for _ <- 1..3 do
        #{unquote(reload)}
        %{results: [%{token_ids: ^expected}]} = Bombus.Serving.batched_run(Running, input)
      end

      receive do: ({:ids, ^expected} -> :ok)
      another = Bombus.load_model!(:demo, device: :cpu)
      serving = Bombus.Serving.new(another, Bombus.load_tokenizer!(:demo), max_new_tokens: 5)
      %{results: [_]} = Bombus.Serving.run(serving, %{text: "Tea", adapter: adapter})
      %{models: 2, adapters: 1} = Bombus.memory_info()
      :ok = Bombus.unload(another)
      IO.puts("all is well")
      """

      {output, status} = Bombus.Fixtures.elixir(script)
      assert {status, output =~ "all is well"} == {0, true}, output
      refute output =~ "restart the VM"
      refute output =~ "not available"
    end
  end

  test "a library that was built anew: the VM keeps the one it has, and says so" do
    root = Path.join(System.tmp_dir!(), "bombus-reload-#{System.unique_integer([:positive])}")
    on_exit(fn -> File.rm_rf!(root) end)
    app = Application.app_dir(:bombus)
    copy = Path.join(root, "bombus")
    File.mkdir_p!(Path.join(copy, "priv/native"))
    File.ln_s!(Path.join(app, "ebin"), Path.join(copy, "ebin"))
    File.ln_s!(Path.join(app, "priv/models"), Path.join(copy, "priv/models"))
    library = Path.join(copy, "priv/native/bombus_nif.so")

    for path <- Path.wildcard(Path.join(app, "priv/native/*")),
        do: File.ln_s!(path, Path.join([copy, "priv/native", Path.basename(path)]))

    File.rm!(library)
    File.cp!(Path.join(app, "priv/native/bombus_nif.so"), library)

    script = """
    model = Bombus.load_model!(:demo, device: :cpu)
    library = #{inspect(library)}
    File.cp!(library, library <> ".new")
    File.rename!(library <> ".new", library)
    {:module, Bombus.Native} = :code.load_file(Bombus.Native)
    {:ok, _} = Bombus.score(model, [1, 2, 3])
    {:ok, _} = Bombus.load_model(:demo, device: :cpu)
    IO.puts("all is well")
    """

    arguments = ["-pa", Path.join(copy, "ebin"), "-e", script]
    {output, status} = System.cmd("elixir", arguments, stderr_to_stdout: true)
    assert {status, output =~ "all is well"} == {0, true}, output
    assert output =~ "restart the VM to use the new one"
  end

  test "a library that is not there is named" do
    script = """
    try do
      Bombus.Native.Library.module!(Bombus.Native.Library.compile([]), fn -> "/nowhere/at/all" end)
    rescue
      error -> IO.puts(Exception.message(error))
    end
    """

    {output, 0} = Bombus.Fixtures.elixir(script)
    assert output =~ "could not load the engine of Bombus"
    assert output =~ "/nowhere/at/all"
  end
end
