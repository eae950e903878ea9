defmodule Mix.Tasks.Bombus.InfoTest do
  use ExUnit.Case

  import ExUnit.CaptureIO

  alias Bombus.{Error, Fixtures, HubServer}
  alias Bombus.Model.Info
  alias Mix.Tasks.Bombus.Info, as: Task

  @moduletag :tmp_dir
  @demo Path.expand("../../priv/models/demo", __DIR__)

  # -> what it wrote, and its exit status
  defp info(arguments) do
    parent = self()

    run = fn ->
      Task.run(arguments)
      exit({:shutdown, 0})
    end

    output = capture_io(fn -> send(parent, {:status, catch_exit(run.())}) end)
    assert_received {:status, {:shutdown, status}}
    {output, status}
  end

  defp copy(case_name, dir) do
    folder = Path.join(dir, "model")
    File.cp_r!(Fixtures.checkpoint(case_name), folder)
    folder
  end

  test "the demo model, in lines" do
    {output, 0} = info(["demo", "--device", "cpu"])
    config = JSON.decode!(File.read!(Path.join(@demo, "config.json")))

    for {name, words} <- [
          {"source", "demo"},
          {"family", "qwen3"},
          {"layers", "#{config["num_hidden_layers"]} of #{config["hidden_size"]}: "},
          {"context", "#{config["max_position_embeddings"]} positions"},
          {"bits", "embedding  "},
          {"device", "cpu: Bombus's own kernels"},
          {"tokenizer", "with a chat template"},
          {"loads", "yes"}
        ] do
      assert output =~ ~r/^#{name} +#{Regex.escape(words)}/m
    end

    refute output =~ ~r/^(missing|warnings)/m
    assert output |> String.split("\n") |> Enum.all?(&(String.trim_trailing(&1) == &1))
  end

  test "it is what a loaded model says of itself" do
    for name <- [
          "bf16-4bit",
          "f32-mistral-windows",
          "bf16-gemma3",
          "f32-llama3",
          "bf16-overrides"
        ] do
      path = Fixtures.checkpoint(name)
      {:ok, info} = Info.read(path, device: :cpu)
      model = Bombus.load_model!(path, device: :cpu)
      shared = [:family, :layers, :context, :hidden_size, :vocab_size]
      assert Map.take(info, shared) == Map.take(model.spec, shared)
      assert {info.device, info.problems, info.source} == {model.device, [], path}

      layouts =
        for part <- info.parts, layout <- part.layouts, do: {layout.bits, layout.group_size}

      assert {model.quantization.bits, model.quantization.group_size} in layouts
    end
  end

  test "windows and rope" do
    {:ok, info} = Info.read(Fixtures.checkpoint("f32-mistral-windows"))
    assert info.windows == [{2, 8}]
    {:ok, info} = Info.read(Fixtures.checkpoint("f32-llama3"))
    assert %{scaling: :llama3, factor: factor} = info.rope
    {output, 0} = info([Fixtures.checkpoint("f32-llama3")])
    assert output =~ "llama3 by #{trunc(factor)}"
    {:ok, info} = Info.read(Fixtures.checkpoint("f32-smollm3"))
    assert info.unrotated > 0
  end

  test "what would not load has the error of a load, and the status 1", %{tmp_dir: dir} do
    folder = copy("f32-three-shards", dir)
    [shard | _others] = folder |> Path.join("*-of-*.safetensors") |> Path.wildcard()
    File.rm!(shard)
    {:error, %Error{} = error} = Bombus.load_model(folder)
    {:ok, info} = Info.read(folder)
    assert info.problems == [error]
    assert info.missing_files == [Path.basename(shard)]
    {output, 1} = info([folder])
    assert output =~ ~r/^loads +no$/m
    assert output =~ error.message
    assert output =~ Path.basename(shard)
  end

  test "what is no model is a line that says so", %{tmp_dir: dir} do
    File.write!(Path.join(dir, "config.json"), ~s({"model_type": "gpt2"}))

    for {arguments, words} <- [
          {[dir], "`gpt2` is not supported"},
          {[Path.join(dir, "nowhere")], "there is no folder"},
          {[], "expected one model"},
          {["demo", "demo"], "expected one model"},
          {["demo", "--device", "tpu"], "--device"},
          {["demo", "--revision", "v2"], "--revision is for a Hub id"}
        ] do
      assert_raise Mix.Error, ~r/#{Regex.escape(words)}/, fn -> Task.run(arguments) end
    end
  end

  describe "of the Hub" do
    setup %{tmp_dir: dir} do
      case_files = fn folder ->
        for name <- File.ls!(folder),
            path = Path.join(folder, name),
            File.regular?(path),
            into: %{} do
          {name, File.read!(path)}
        end
      end

      shards = case_files.(Fixtures.checkpoint("f32-three-shards"))
      gpt2 = %{"config.json" => ~s({"model_type": "gpt2"}), "model.safetensors" => "weights"}

      models = %{
        "owner/demo" => case_files.(@demo),
        "owner/shards" => shards,
        "owner/gpt2" => gpt2
      }

      server = HubServer.start(models)
      System.put_env(%{"HF_ENDPOINT" => HubServer.url(server), "HF_HOME" => dir})
      on_exit(fn -> Enum.each(["HF_ENDPOINT", "HF_HOME"], &System.delete_env/1) end)
      %{server: server}
    end

    test "a model is described as its folder is, and no weights are downloaded", %{server: server} do
      for {id, folder} <- [
            {"owner/demo", @demo},
            {"owner/shards", Fixtures.checkpoint("f32-three-shards")}
          ] do
        HubServer.forget(server)
        {:ok, info} = Info.read({:hf, id}, device: :cpu)
        {:ok, local} = Info.read(folder, device: :cpu)
        assert info == %{local | source: id}
        got = for %{method: "GET"} = request <- HubServer.requests(server), do: request
        weights = Enum.filter(got, &(&1.path =~ ~r/\.safetensors$/))
        assert weights != [] and Enum.all?(weights, &(&1.headers["range"] =~ "bytes=0-"))
        refute Enum.any?(got, &(&1.path =~ ~r/(tokenizer|vocab)\.json$/))
        refute Bombus.Hub.cached?(id, :model)
      end
    end

    test "nothing of it is left but small files in the cache" do
      before = File.ls!(System.tmp_dir!())
      {output, 0} = info(["owner/demo"])
      assert output =~ ~r/^source +owner\/demo$/m
      new = for name <- File.ls!(System.tmp_dir!()) -- before, name =~ ~r/^\.tmp/, do: name
      assert new == []
    end

    test "messages name the id", %{server: server} do
      assert_raise Mix.Error, ~r/`owner\/gpt2\/config.json`.*`gpt2` is not supported/, fn ->
        Task.run(["owner/gpt2"])
      end

      HubServer.push(server, "owner/gpt2", %{"config.json" => File.read!(@demo <> "/config.json")})

      assert {:error, %Error{reason: :not_found, message: message}} =
               Info.read({:hf, "owner/gpt2"})

      assert message =~ "`model.safetensors` in `owner/gpt2`"
      assert {:error, %Error{reason: :not_found}} = Info.read({:hf, "owner/other"})
      assert {:error, %Error{reason: :offline}} = Info.read({:hf, "owner/demo", offline: true})
    end

    test "what is in the cache needs no Hub" do
      {:ok, _folder} = Bombus.Hub.download("owner/demo")
      {:ok, local} = Info.read(@demo, device: :cpu)
      assert {:ok, info} = Info.read({:hf, "owner/demo", offline: true}, device: :cpu)
      assert info == %{local | source: "owner/demo"}
      System.put_env("HF_ENDPOINT", "http://127.0.0.1:1")

      log =
        ExUnit.CaptureLog.capture_log(fn ->
          assert {:ok, ^info} = Info.read({:hf, "owner/demo"}, device: :cpu)
        end)

      assert log =~ "Using what is in the cache"
    end
  end
end
