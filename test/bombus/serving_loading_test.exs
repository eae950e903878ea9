defmodule Bombus.ServingLoadingTest do
  # Servings that load their models: what they say meanwhile, and where it fails. Not async: what
  # names the Hub is the environment.
  use ExUnit.Case

  import Bombus.Fixtures, only: [assert_soon: 1]
  import ExUnit.CaptureLog

  alias Bombus.{Error, Fixtures, HubServer, Serving}

  @moduletag :tmp_dir
  @endless Fixtures.checkpoint("f32-untied")
  @input %{token_ids: [3, 1, 4, 1, 5], max_new_tokens: 5}

  defp ids(%{results: [%{token_ids: ids}]}), do: ids

  describe "while the model is downloaded" do
    setup %{tmp_dir: dir} do
      files =
        Map.new(File.ls!(@endless) -- ["adapters"], &{&1, File.read!(Path.join(@endless, &1))})

      server = HubServer.start(%{"owner/name" => files})
      variables = ~w(HF_ENDPOINT HF_HOME HF_HUB_CACHE HF_TOKEN)
      before = Map.new(variables, &{&1, System.get_env(&1)})
      Enum.each(variables, &System.delete_env/1)
      System.put_env(%{"HF_ENDPOINT" => HubServer.url(server), "HF_HOME" => dir})
      on_exit(fn -> System.put_env(Map.to_list(before)) end)

      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [{:hold, 1000, self()}])
      child = {Serving, name: Slow, model: {:hf, "owner/name"}, tokenizer: nil}
      start_supervised!(child)
      # It has started, and loads.
      assert_receive {:held, connection}, 10_000
      %{connection: connection}
    end

    test "it says how far it is, and callers wait", %{connection: connection} do
      assert_soon(fn ->
        send(connection, :more)

        match?(
          %{state: :loading, batch: 0, queue: 0, progress: %{bytes: bytes, total: total}}
          when bytes in 1..(total - 1)//1,
          Serving.status(Slow)
        )
      end)

      waiting = for _ <- 1..3, do: Task.async(fn -> Serving.batched_run(Slow, @input) end)
      streaming = Task.async(fn -> Slow |> Serving.stream(@input) |> Enum.to_list() end)
      ready = Task.async(fn -> Serving.await_ready(Slow, :infinity) end)
      dying = spawn(fn -> Serving.batched_run(Slow, @input) end)
      assert_soon(fn -> Serving.status(Slow).queue == 6 end)
      Process.exit(dying, :kill)
      assert_soon(fn -> Serving.status(Slow).queue == 5 end)

      send(connection, :go)
      [first | _] = answers = Task.await_many(waiting, 60_000)
      assert Enum.all?(answers, &(ids(&1) == ids(first) and length(ids(&1)) == 5))
      assert Task.await(streaming, 60_000) == ids(first)
      assert Task.await(ready) == :ok
      assert %{state: :ready, progress: nil, batch: 0, queue: 0} = Serving.status(Slow)
    end

    test "callers wait as long as they say", %{connection: connection} do
      soon = Map.put(@input, :timeout, 20)
      assert {:error, %Error{reason: :loading}} = Serving.batched_run(Slow, soon)
      assert [{:error, %Error{reason: :loading}}, _] = Serving.batched_run(Slow, [soon, soon])
      assert_raise Error, ~r/still loads/, fn -> Serving.stream(Slow, soon) end
      assert {:error, %Error{reason: :loading}} = Serving.await_ready(Slow, 0)
      assert_raise ArgumentError, ~r/:timeout/, fn -> Serving.await_ready(Slow, -1) end
      assert Serving.status(Slow).queue == 0
      send(connection, :go)
      assert Serving.await_ready(Slow) == :ok
    end

    test "a caller's wait can be cancelled" do
      task = Task.async(fn -> Serving.batched_run(Slow, @input) end)
      assert_soon(fn -> Serving.status(Slow).queue == 1 end)
      assert Serving.cancel(task) == :ok
      assert %{results: [%{finish_reason: :cancelled, token_ids: []}]} = Task.await(task)
    end

    test "it stops at once, and is loaded again after a crash", %{connection: connection} do
      task = Task.async(fn -> Serving.batched_run(Slow, @input) end)
      assert_soon(fn -> Serving.status(Slow).queue == 1 end)
      killed = Process.whereis(Slow)
      {:links, links} = Process.info(killed, :links)
      Process.exit(killed, :kill)
      assert {:error, %Error{reason: :stopped}} = Task.await(task)
      assert_soon(fn -> match?(%{state: _}, Serving.status(Slow)) end)
      # What loaded for the first process has ended with it.
      assert_soon(fn -> Enum.count(links, &Process.alive?/1) == 1 end)
      assert Serving.await_ready(Slow) == :ok
      send(connection, :go)
    end

    test "it stops at once where it is told to" do
      task = Task.async(fn -> Serving.batched_run(Slow, @input) end)
      assert_soon(fn -> Serving.status(Slow).queue == 1 end)
      stop_supervised!(Slow)
      assert {:error, %Error{reason: :stopped}} = Task.await(task)
    end
  end

  # A supervisor that does not restart anything.
  defp start!(options) do
    {:ok, supervisor} =
      Supervisor.start_link([{Serving, options}], strategy: :one_for_one, max_restarts: 0)

    on_exit(fn -> Process.exit(supervisor, :shutdown) end)
  end

  defp failed?(name), do: match?(%{state: {:failed, _error}}, Serving.status(name))

  test "where it fails, callers get the error, and it tries again", %{tmp_dir: dir} do
    folder = Path.join(dir, "later")

    log =
      capture_log(fn ->
        start!(name: Later, model: folder, tokenizer: nil)
        assert_soon(fn -> failed?(Later) end)
        assert %{state: {:failed, %Error{reason: :not_found} = error}} = Serving.status(Later)
        assert Serving.batched_run(Later, @input) == {:error, error}
        assert Serving.batched_run(Later, [@input, @input]) == [{:error, error}, {:error, error}]
        assert Serving.await_ready(Later) == {:error, error}
        assert_raise Error, ~r/later/, fn -> Serving.stream(Later, @input) end

        File.cp_r!(@endless, folder)
        assert_soon(fn -> Serving.await_ready(Later) == :ok end)
        assert length(ids(Serving.batched_run(Later, @input))) == 5
      end)

    assert log =~ "Later" and log =~ "tries again in 1 s"
  end

  test "a checkpoint that is changed in place is loaded anew", %{tmp_dir: dir} do
    folder = Fixtures.copy(@endless, dir)
    weights = Path.join(folder, "model.safetensors")
    whole = File.read!(weights)
    start!(name: Changed, model: folder, tokenizer: nil, device: :cpu)
    before = ids(Serving.batched_run(Changed, @input))

    capture_log(fn ->
      # Nothing of the new file is used before it is whole.
      File.write!(weights, binary_part(whole, 0, 2000))
      assert {:error, %Error{reason: :io}} = Serving.batched_run(Changed, @input)
      assert_soon(fn -> failed?(Changed) end)
      assert {:error, %Error{reason: :bad_checkpoint}} = Serving.batched_run(Changed, @input)
      File.write!(weights, whole)
      assert_soon(fn -> Serving.status(Changed).state == :ready end)
    end)

    assert ids(Serving.batched_run(Changed, @input)) == before
  end

  test "a change that leaves it whole costs one answer", %{tmp_dir: dir} do
    folder = Fixtures.copy(@endless, dir)
    weights = Path.join(folder, "model.safetensors")
    start!(name: Touched, model: folder, tokenizer: nil, device: :cpu)
    before = ids(Serving.batched_run(Touched, @input))
    File.touch!(weights, 1_000_000_000)

    capture_log(fn ->
      assert_raise Error, ~r/changed/, fn -> Touched |> Serving.stream(@input) |> Stream.run() end
      assert ids(Serving.batched_run(Touched, @input)) == before
    end)
  end

  test "a given model whose files have changed cannot be loaded anew: it says so", %{tmp_dir: dir} do
    folder = Fixtures.copy(@endless, dir)
    model = Bombus.load_model!(folder, device: :cpu)
    adapter = Fixtures.adapter("f32-untied", "last-qv")
    start!(name: Given, model: model, tokenizer: nil)
    start!(name: Adapted, model: model, tokenizer: nil, adapter: adapter)
    for name <- [Given, Adapted], do: assert(Serving.await_ready(name) == :ok)
    File.touch!(Path.join(folder, "model.safetensors"), 1_000_000_000)

    capture_log(fn ->
      for name <- [Given, Adapted] do
        assert {:error, %Error{reason: :io} = error} = Serving.batched_run(name, @input)
        assert_soon(fn -> Serving.status(name).state == {:failed, error} end)
        assert Serving.batched_run(name, @input) == {:error, error}
      end
    end)
  end

  test "a model that is gone is loaded anew" do
    start!(name: Gone, model: @endless, tokenizer: nil)
    before = ids(Serving.batched_run(Gone, @input))
    {:ok, serving, _server} = Serving.Client.checkout(Gone, nil)
    Bombus.Native.await(&{Bombus.Native.unload_model(serving.model.ref, true, &1), nil})

    capture_log(fn ->
      assert {:error, %Error{reason: :unloaded}} = Serving.batched_run(Gone, @input)
      assert ids(Serving.batched_run(Gone, @input)) == before
    end)
  end

  test "a fault of a request's adapter is no fault of the model", %{tmp_dir: dir} do
    folder = Fixtures.copy(Fixtures.adapter("f32-untied", "last-qv"), dir)
    adapter = Bombus.load_adapter!(folder)
    start!(name: Sound, model: @endless, tokenizer: nil)
    assert Serving.await_ready(Sound) == :ok
    {:ok, serving, _server} = Serving.Client.checkout(Sound, nil)
    File.touch!(Path.join(folder, "adapters.safetensors"), 1_000_000_000)
    assert {:error, %Error{}} = Serving.batched_run(Sound, Map.put(@input, :adapter, adapter))
    assert length(ids(Serving.batched_run(Sound, @input))) == 5
    assert {:ok, ^serving, _server} = Serving.Client.checkout(Sound, nil)
  end

  describe "an adapter that does not fit" do
    test "fails with the load, before any request" do
      other = Fixtures.adapter("bf16-4bit", "all-layers")

      capture_log(fn ->
        start!(
          name: Unfit,
          model: Fixtures.checkpoint("f32-tied"),
          tokenizer: nil,
          adapter: other
        )

        assert_soon(fn -> failed?(Unfit) end)
      end)

      assert %{state: {:failed, %Error{reason: :bad_adapter} = error}} = Serving.status(Unfit)
      assert error.message =~ "does not fit"
    end

    test "where all is loaded, the serving does not start" do
      adapter = Bombus.load_adapter!(Fixtures.adapter("bf16-4bit", "all-layers"))
      model = Bombus.load_model!(Fixtures.checkpoint("f32-tied"))
      Process.flag(:trap_exit, true)

      for child <- [
            [model: model, tokenizer: nil, adapter: adapter],
            [serving: Serving.new(model, nil, adapter: adapter)]
          ] do
        assert {:error, %Error{reason: :bad_adapter}} = Serving.start_link([name: Unfit] ++ child)
      end
    end
  end

  test "the mistakes of a child's options are raised at once" do
    for {wrong, words} <- [
          {[model: 5], "source"},
          {[model: {:hf, "not an id"}], "Hub id"},
          {[model: :demo, tokenizer: {:local, 1}], "source"},
          {[model: :demo, adapter: 1.5], "source"},
          {[model: :demo, device: :tpu], ":device"},
          {[model: :demo, quantization: :int9], ":quantization"},
          {[model: :demo, min_new_tokens: 9, max_new_tokens: 3], ":min_new_tokens"},
          {[model: :demo, timeout: 1.5], ":timeout"},
          {[model: :demo, temperature: -1], ":temperature"}
        ] do
      assert_raise ArgumentError, ~r/#{words}/, fn ->
        Serving.start_link([name: Wrong] ++ wrong)
      end
    end
  end

  test "status counts what runs and what waits" do
    start_supervised!({Serving, name: Busy, model: @endless, tokenizer: nil, max_batch_size: 2})
    long = %{@input | max_new_tokens: 400}
    tasks = for _ <- 1..5, do: Task.async(fn -> Serving.batched_run(Busy, long) end)
    assert_soon(fn -> match?(%{state: :ready, batch: 2, queue: 3}, Serving.status(Busy)) end)
    Enum.each(tasks, &Serving.cancel/1)
    Task.await_many(tasks)
    assert_soon(fn -> match?(%{state: :ready, batch: 0, queue: 0}, Serving.status(Busy)) end)
  end
end
