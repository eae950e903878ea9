defmodule Bombus.BadHubTest do
  # A hub that misbehaves, and a cache that somebody has planted things in. Not async: what names the
  # server is the environment.
  use ExUnit.Case

  import ExUnit.CaptureLog

  alias Bombus.{Error, Fixtures, Hub, HubServer}

  @moduletag :tmp_dir
  @id "owner/name"
  @demo Application.app_dir(:bombus, "priv/models/demo")
  @variables ~w(HF_ENDPOINT HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_TOKEN HF_TOKEN_PATH
                HUGGING_FACE_HUB_TOKEN HF_HUB_OFFLINE TRANSFORMERS_OFFLINE XDG_CACHE_HOME)

  setup %{tmp_dir: dir} do
    server = HubServer.start(%{@id => files()})
    before = Map.new(@variables, &{&1, System.get_env(&1)})
    Enum.each(@variables, &System.delete_env/1)
    System.put_env(%{"HF_ENDPOINT" => HubServer.url(server), "HF_HOME" => dir})
    for {key, value} <- [hub_pause: 10, hub_pace: 300, hub_most: 2_000_000], do: put(key, value)

    on_exit(fn ->
      System.put_env(Map.to_list(before))
      for key <- [:hub_pause, :hub_pace, :hub_most], do: Application.delete_env(:bombus, key)
    end)

    cache = Path.join(dir, "hub")
    %{server: server, cache: cache, repository: Path.join(cache, "models--owner--name")}
  end

  defp put(key, value), do: Application.put_env(:bombus, key, value)
  defp files, do: Map.new(File.ls!(@demo), &{&1, File.read!(Path.join(@demo, &1))})

  defp failed(answer) do
    {{:error, %Error{} = error}, _log} = with_log(answer)
    error
  end

  # Everything below, links as they are.
  defp all(folder), do: Path.wildcard(Path.join(folder, "**"), match_dot: true)
  defp partial(cache), do: Enum.filter(all(cache), &String.ends_with?(&1, ".incomplete"))

  describe "a body" do
    test "without a length and an end is given up, and nothing of it stays", context do
      %{server: server, cache: cache} = context
      HubServer.push(server, "owner/big", %{"config.json" => :rand.bytes(100)})

      for method <- ["HEAD", "GET"],
          do: HubServer.fault(server, :hub, method, ~r/big/, List.duplicate(:endless, 20))

      error = failed(fn -> Hub.download("owner/big", kind: :model) end)
      assert error.reason == :bad_download
      assert error.message =~ "does not end after 2.0 MB"
      assert partial(cache) == []
      assert Enum.filter(all(cache), &(File.lstat!(&1).size > 100_000)) == []
    end

    test "without a length has that of the listing", %{server: server} do
      HubServer.list_sizes(server)
      bytes = :rand.bytes(5_000)

      HubServer.push(server, "owner/listed", %{
        "config.json" => "{}",
        "model.safetensors" => bytes
      })

      opaque = &List.keyreplace(&1, "ETag", 0, {"ETag", "no-hash"})

      for method <- ["HEAD", "GET"] do
        answers = List.duplicate({:no_length, opaque}, 9)
        HubServer.fault(server, :hub, method, ~r/listed/, answers)
      end

      assert {:ok, folder} = Hub.download("owner/listed", kind: :model)
      assert File.read!(Path.join(folder, "model.safetensors")) == bytes
    end

    test "that goes on behind its announced size is given up", %{server: server, cache: cache} do
      longer = fn bytes -> {:body, bytes <> String.duplicate("x", 50_000)} end
      HubServer.fault(server, :hub, "GET", ~r/config.json/, List.duplicate(longer.("{}"), 9))
      assert failed(fn -> Hub.download(@id, kind: :model) end).reason == :bad_download
      assert partial(cache) == []
    end

    test "whose length lies is not taken for whole", %{server: server, cache: cache} do
      bytes = files()["generation_config.json"]

      for n <- [5, 1_000_000] do
        File.rm_rf!(cache)
        answers = List.duplicate({:length, n}, 99)
        HubServer.fault(server, :hub, "GET", ~r/generation_config/, answers)

        case with_log(fn -> Hub.download(@id, kind: :model) end) do
          {{:ok, folder}, _log} ->
            assert File.read!(Path.join(folder, "generation_config.json")) == bytes

          {{:error, error}, _log} ->
            assert error.reason in [:bad_download, :no_network]
        end

        HubServer.forget_faults(server)
      end

      assert {:ok, _folder} = Hub.download(@id, kind: :model)
      assert partial(cache) == []
    end

    test "that drips is given up, and goes on later", %{server: server, cache: cache} do
      weights = :rand.bytes(500_000)

      HubServer.push(server, "owner/large", %{
        "config.json" => "{}",
        "model.safetensors" => weights
      })

      HubServer.fault(server, :cdn, "GET", ~r/blobs/, List.duplicate({:trickle, 100_000}, 2))
      error = failed(fn -> Hub.download("owner/large", kind: :model) end)
      assert error.reason == :no_network
      assert error.message =~ "slower than 1024 bytes a second"
      assert [incomplete] = partial(cache)
      assert File.stat!(incomplete).size >= 100_000
      assert {:ok, folder} = Hub.download("owner/large", kind: :model)
      assert File.read!(Path.join(folder, "model.safetensors")) == weights
      assert partial(cache) == []
      ranges = for %{host: :cdn} = r <- HubServer.requests(server), do: r.headers["range"]
      assert "bytes=" <> _rest = List.last(ranges)
    end

    test "that ends after each byte is given up", %{server: server} do
      HubServer.push(server, "owner/large", %{
        "config.json" => "{}",
        "model.safetensors" => :rand.bytes(500_000)
      })

      HubServer.fault(server, :cdn, "GET", ~r/blobs/, List.duplicate({:cut, 1}, 100))
      error = failed(fn -> Hub.download("owner/large", kind: :model) end)
      assert error.reason == :no_network
    end

    test "of a small file that is announced with gigabytes is not asked for", context do
      %{server: server, cache: cache} = context
      huge = &[{"X-Linked-Size", "300000000"} | &1]
      HubServer.fault(server, :hub, "HEAD", ~r/config.json/, [{:headers, huge}])
      error = failed(fn -> Hub.download(@id, kind: :model) end)
      assert error.reason == :bad_download
      assert error.message =~ "such a file may have"
      assert partial(cache) == []
    end

    test "that is packed is not unpacked", %{server: server} do
      bomb = :zlib.gzip(String.duplicate("x", 1_000_000))
      HubServer.fault(server, :hub, "GET", ~r/config.json/, List.duplicate({:body, bomb}, 9))
      assert failed(fn -> Hub.download(@id, kind: :model) end).reason == :bad_download
    end
  end

  describe "a listing" do
    # Shards without an index are found by it.
    defp shards(server) do
      shard = File.read!(Path.join(@demo, "model.safetensors"))
      files = %{"config.json" => "{}", "model-00001-of-00001.safetensors" => shard}
      HubServer.push(server, "owner/shards", files)
    end

    test "that has no end, drips, or is none, is an error", %{server: server} do
      shards(server)
      deep = String.duplicate("[", 1_000_000)

      for answer <- [{:trickle, 3}, {:body, deep}, {:body, "<html>"}, {:body, ""}] do
        HubServer.fault(server, :hub, "GET", ~r{/api/}, List.duplicate(answer, 9))
        reason = failed(fn -> Hub.download("owner/shards", kind: :model) end).reason
        assert reason in [:server_error, :no_network], inspect(answer)
        HubServer.forget_faults(server)
      end

      assert {:ok, _folder} = Hub.download("owner/shards", kind: :model)
    end
  end

  describe "an index" do
    @index "model.safetensors.index.json"

    test "left from another checkpoint is no reason to fail", %{server: server} do
      for {id, names} <- [
            {"owner/left",
             ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]},
            {"owner/other", ["weights.safetensors"]}
          ] do
        map = Map.new(names, &{"model.#{&1}.weight", &1})
        index = JSON.encode!(%{metadata: %{}, weight_map: map})
        HubServer.push(server, id, Map.put(files(), @index, index))
        assert {:ok, folder} = Hub.download(id, kind: :model)
        assert File.exists?(Path.join(folder, "model.safetensors"))
        assert Hub.cached?(id, :model)
        assert {:ok, ^folder} = Hub.download(id, kind: :model, offline: true)
        assert {:ok, _model} = Bombus.load_model({:hf, id})
      end
    end

    test "that misses a shard is completed by the names of the others", %{server: server} do
      folder = Fixtures.checkpoint("f32-three-shards")
      files = Map.new(File.ls!(folder), &{&1, File.read!(Path.join(folder, &1))})
      index = JSON.decode!(files[@index])

      short =
        Map.reject(index["weight_map"], fn {_tensor, shard} -> shard =~ "00002-of" end)

      files = Map.put(files, @index, JSON.encode!(%{index | "weight_map" => short}))
      HubServer.push(server, "owner/short", files)
      assert {:ok, model} = Bombus.load_model({:hf, "owner/short"})
      expected = Bombus.score(Bombus.load_model!(folder), [1, 2, 3])
      assert Bombus.score(model, [1, 2, 3]) == expected
    end
  end

  describe "a link in the cache" do
    setup %{tmp_dir: dir} do
      outside = Path.join(dir, "outside")
      File.mkdir_p!(outside)
      for {name, bytes} <- files(), do: File.write!(Path.join(outside, name), bytes)
      {:ok, folder} = Hub.download(@id)
      %{outside: outside, folder: folder}
    end

    defp plant(path, target) do
      File.rm_rf!(path)
      File.ln_s!(target, path)
    end

    test "of a file to the outside is not followed", context do
      %{folder: folder, outside: outside, repository: repository} = context

      for target <- [outside, Path.relative_to(outside, folder, force: true), "/dev/zero"] do
        target = if target == "/dev/zero", do: target, else: Path.join(target, "config.json")
        plant(Path.join(folder, "config.json"), target)
        refute Hub.cached?(@id)
        assert {:error, %Error{reason: :offline}} = Bombus.load_model({:hf, @id, offline: true})
        # It is downloaded, and takes its place.
        assert {:ok, ^folder} = Hub.download(@id)
        assert {:ok, "../../blobs/" <> _name} = File.read_link(Path.join(folder, "config.json"))
      end

      # Nor from a blob.
      [blob] =
        Path.wildcard(Path.join([repository, "blobs", HubServer.etag(files()["config.json"])]))

      plant(blob, Path.join(outside, "config.json"))
      refute Hub.cached?(@id)
      assert {:ok, ^folder} = Hub.download(@id)
      assert File.lstat!(blob).type == :regular
      # Nor where it is one that is not asked for, but that loading may read.
      plant(Path.join(folder, "added_tokens.json"), Path.join(outside, "config.json"))
      refute Hub.cached?(@id)
      assert {:error, %Error{reason: :io} = error} = Bombus.load_tokenizer({:hf, @id})
      assert error.message =~ "added_tokens.json"
    end

    test "of a folder to the outside is not written through", context do
      %{outside: outside, repository: repository, server: server} = context
      HubServer.push(server, @id, Map.put(files(), "generation_config.json", "{ }"))
      before = File.ls!(outside)

      for name <- ["snapshots", "blobs", "refs"] do
        File.rm_rf!(repository)
        File.mkdir_p!(repository)
        plant(Path.join(repository, name), outside)
        _answer = with_log(fn -> Hub.download(@id) end)
        assert File.ls!(outside) == before
      end

      File.rm_rf!(repository)
      locks = Path.join([Path.dirname(repository), ".locks", Path.basename(repository)])
      plant(locks, outside)
      assert failed(fn -> Hub.download(@id) end).reason == :io
      assert File.ls!(outside) == before
    end

    test "in the place of a download is not written through", context do
      %{outside: outside, repository: repository, server: server} = context
      victim = Path.join(outside, "config.json")
      before = File.read!(victim)
      HubServer.push(server, @id, Map.put(files(), "config.json", before <> " "))
      etag = HubServer.etag(before <> " ")
      plant(Path.join([repository, "blobs", etag <> ".incomplete"]), victim)
      assert {:ok, folder} = Hub.download(@id)
      assert File.read!(Path.join(folder, "config.json")) == before <> " "
      assert File.read!(victim) == before
    end

    test "of a branch's commit, or what is no commit, is none", context do
      %{outside: outside, repository: repository, folder: folder} = context
      main = Path.join([repository, "refs", "main"])
      File.write!(Path.join(outside, "commit"), Path.basename(folder))
      plant(main, Path.join(outside, "commit"))
      refute Hub.cached?(@id)

      for bytes <- ["../../..", "", String.duplicate("a", 5_000), "a/b"] do
        File.rm!(main)
        File.write!(main, bytes)
        refute Hub.cached?(@id)
      end

      File.rm!(main)
      {_output, 0} = System.cmd("mkfifo", [main])
      refute Hub.cached?(@id)
      assert Hub.cached() != []
    end

    test "that is the cache, or a repository, on another disk is followed", context do
      %{cache: cache, repository: repository, tmp_dir: dir} = context
      moved = Path.join(dir, "moved")
      File.rename!(repository, moved)
      File.ln_s!(moved, repository)
      assert Hub.cached?(@id)
      File.rename!(cache, Path.join(dir, "elsewhere"))
      File.ln_s!(Path.join(dir, "elsewhere"), cache)
      assert Hub.cached?(@id)
      assert {:ok, _model} = Bombus.load_model({:hf, @id})
    end
  end

  describe "the cache" do
    test "is listed", %{server: server, cache: cache} do
      assert Hub.cached() == []
      assert Hub.cached(cache_dir: Path.join(cache, "nothing")) == []
      adapter = Application.app_dir(:bombus, "priv/models/adapters/pirate")

      HubServer.push(
        server,
        "solo",
        Map.new(File.ls!(adapter), &{&1, File.read!(Path.join(adapter, &1))})
      )

      {:ok, folder} = Hub.download(@id)
      {:ok, _folder} = Hub.download("solo")
      File.mkdir_p!(Path.join(cache, "datasets--owner--data/blobs"))
      assert [one, two] = Hub.cached()
      commit = HubServer.commit(files())
      assert %{id: @id, kind: :model, revisions: [revision]} = one
      assert revision == %{commit: commit, names: ["main"], path: folder}

      size =
        files() |> Map.delete("README.md") |> Map.values() |> Enum.map(&byte_size/1) |> Enum.sum()

      # With the name of the commit.
      assert one.size == size + 40
      assert DateTime.diff(DateTime.utc_now(), one.last_used) < 3600
      assert %{id: "solo", kind: :adapter} = two
      # Another revision shares what is the same.
      HubServer.push(server, @id, Map.put(files(), "generation_config.json", "{ }"), "refs/pr/1")
      {:ok, _folder} = Hub.download(@id, revision: "refs/pr/1")
      assert [%{revisions: [_, _] = both, size: more}, _two] = Hub.cached()
      assert both |> Enum.flat_map(& &1.names) |> Enum.sort() == ["main", "refs/pr/1"]
      assert more == size + 3 + 80
      assert Hub.cached(cache_dir: cache) == Hub.cached()
    end

    test "is emptied of a repository, whose model goes on", %{cache: cache} do
      {:ok, model} = Bombus.load_model({:hf, @id})
      {:ok, tokenizer} = Bombus.load_tokenizer({:hf, @id})
      serving = Bombus.Serving.new(model, tokenizer, max_new_tokens: 3)
      before = Fixtures.plain(Bombus.Serving.run(serving, "Hello"))
      [%{size: size}] = Hub.cached()
      assert Hub.delete(@id) == {:ok, size}
      assert Hub.cached() == []
      assert File.ls!(cache) == [".locks"]
      assert {:error, %Error{reason: :not_found} = error} = Hub.delete({:hf, @id})
      assert error.message =~ @id
      assert Fixtures.plain(Bombus.Serving.run(serving, "Hello there")) != before
      assert Fixtures.plain(Bombus.Serving.run(serving, "Hello")) == before
      assert {:ok, _model} = Bombus.load_model({:hf, @id})
    end

    test "is not emptied of what is downloaded just now, or is outside", context do
      %{server: server, cache: cache, repository: repository, tmp_dir: dir} = context
      put(:hub_pace, 60_000)
      HubServer.push(server, "owner/large", %{"config.json" => :rand.bytes(10_000)})
      HubServer.fault(server, :hub, "GET", ~r/large/, [{:trickle, 1_000}])
      task = Task.async(fn -> Hub.download("owner/large", kind: :model) end)
      Fixtures.assert_soon(fn -> partial(cache) != [] end)
      assert {:error, %Error{reason: :busy}} = Hub.delete("owner/large")
      Task.shutdown(task, :brutal_kill)
      Fixtures.assert_soon(fn -> match?({:ok, _bytes}, Hub.delete("owner/large")) end)

      # A link in it is removed, and not what it leads to.
      {:ok, folder} = Hub.download(@id)
      kept = Path.join(dir, "kept")
      File.mkdir_p!(kept)
      File.write!(Path.join(kept, "file"), "kept")
      File.ln_s!(kept, Path.join(folder, "link"))
      assert {:ok, _bytes} = Hub.delete(@id)
      assert File.read!(Path.join(kept, "file")) == "kept"
      File.ln_s!(kept, repository)
      assert {:error, %Error{reason: :io}} = Hub.delete(@id)
      assert File.read!(Path.join(kept, "file")) == "kept"

      for wrong <- ["../x", "", "a/b/c", {:hub, @id}, 5, {:hf, @id, revision: "main"}] do
        assert_raise ArgumentError, fn -> Hub.delete(wrong) end
      end
    end
  end
end
